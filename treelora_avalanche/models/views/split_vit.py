"""A vision transformer in two parts: the blocks that nothing trains, and the rest.

What the frozen part computes of an image does not change while the model is trained. So it needs no
gradient, and can be kept: see :class:`~treelora_avalanche.plugins.ActivationCachePlugin`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from treelora_avalanche.adapters import TrainableView

_AFTER_EMBEDDING = ("blocks.", "norm.", "attn_pool.", "fc_norm.", "head.")


def find_transformer(model: nn.Module) -> VisionTransformer | None:
    """The timm vision transformer in a model, if it has timm's own forward pass.

    :param model: a plain model, or one with LoRA; with or without a view.
    :return: None where there is none.
    """
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            return module if _has_own(module, "forward", "forward_features") else None
    return None


def _has_own(vit: VisionTransformer, *methods: str) -> bool:
    """Whether a transformer has timm's own methods, and not those of a heir."""
    return all(getattr(type(vit), name) is getattr(VisionTransformer, name) for name in methods)


def trainable_view(model: nn.Module) -> TrainableView:
    """The view of a model: in two parts where its kind is known, else through its parameters alone.

    :param model: a model with LoRA.
    """
    return TrainableView(model) if find_transformer(model) is None else PrefixView(model)


def frozen_blocks(vit: VisionTransformer) -> int | None:
    """Number of blocks below the lowest one with a trained parameter.

    :param vit: the transformer.
    :return: 0 where that is the first block; None where the embedding of the patches is trained.
    """
    lowest = len(vit.blocks)
    for name, parameter in vit.named_parameters():
        if parameter.requires_grad:
            if not name.startswith(_AFTER_EMBEDDING):
                return None
            if name.startswith("blocks."):
                lowest = min(lowest, int(name.split(".")[1]))
    return lowest


def answers_by_class_token(vit: VisionTransformer) -> bool:
    """Whether the output of the last block is read at the class token alone.

    :param vit: the transformer.
    """
    last = vit.blocks[-1]
    return (
        _has_own(vit, "forward_head", "pool")
        and vit.global_pool == "token"
        and vit.attn_pool is None
        and vit.has_class_token
        and type(last) is Block
        and type(last.attn) is Attention
        and getattr(last.attn, "gate", None) is None
    )


def class_token_of(block: nn.Module, hidden: Tensor) -> Tensor:
    """Output of a block at the class token.

    Its keys and values come from all tokens, its query and all that follows from one.

    :param block: a block of timm.
    :param hidden: ``(batch, n_tokens, dim)``, the class token first.
    :return: ``(batch, 1, dim)``.
    """
    at: Any = block  # to mypy, what a module holds may be a tensor
    attention = at.attn
    n, n_tokens, _ = hidden.shape
    qkv = attention.qkv(at.norm1(hidden)).reshape(
        n, n_tokens, 3, attention.num_heads, attention.head_dim
    )
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, n_heads, n_tokens, head_dim) each
    # Of a single query the fused attention is not the faster one, and in bf16 on a CPU far slower.
    scores = (attention.scale * attention.q_norm(q[:, :, :1])) @ attention.k_norm(k).mT
    mixed = attention.attn_drop(scores.softmax(-1)) @ v  # (batch, n_heads, 1, head_dim)
    mixed = attention.norm(mixed.transpose(1, 2).flatten(2))  # (batch, 1, dim)
    mixed = attention.proj_drop(attention.proj(mixed))
    token = hidden[:, :1] + at.drop_path1(at.ls1(mixed))
    return token + at.drop_path2(at.ls2(at.mlp(at.norm2(token))))


class PrefixView(TrainableView):
    """The view of a vision transformer that does no work twice and none that is not asked for.

    The blocks below the lowest trained one run without gradients, and ``forward`` also takes what
    they have computed, in place of images. Of the last block, where the head reads nothing else,
    only the class token's output is computed. The logits are those of the model up to rounding.

    :param module: a peft model around a timm vision transformer.
    :raises ValueError: if there is no timm vision transformer in the model.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        vit = find_transformer(module)
        if vit is None:
            raise ValueError(
                f"`module` ({type(module).__name__}) has no timm VisionTransformer with timm's own "
                "forward pass; use TrainableView."
            )
        self.n_settled = 0
        """Blocks below the suffix though they have trained parameters: they are trained no more."""
        self.n_frozen = frozen_blocks(vit)
        """Blocks of the prefix, see :func:`frozen_blocks`; told anew when the mode is set."""

    def train(self, mode: bool = True) -> PrefixView:
        """Sets the mode, see :meth:`torch.nn.Module.train`, and finds the prefix again."""
        n_frozen = frozen_blocks(self.transformer)
        self.n_frozen = None if n_frozen is None else max(n_frozen, self.n_settled)
        super().train(mode)
        return self

    @property
    def transformer(self) -> VisionTransformer:
        """The transformer inside the peft model."""
        # Not kept: as a second submodule it would give every parameter a second name.
        return cast(VisionTransformer, find_transformer(self.module))

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, from the input side to the output side."""
        return list(self.transformer.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the forward pass."""
        return self.autocast or next(self.transformer.parameters()).dtype

    def prefix(self, images: Tensor) -> Tensor:
        """What the frozen part computes, without gradients: ``(batch, n_tokens, dim)``.

        :param images: ``(batch, channels, height, width)``.
        """
        vit = self.transformer
        trained = torch.is_grad_enabled() and self.n_frozen is None
        with torch.set_grad_enabled(trained), self.autocasting():
            hidden = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
            for block in self.blocks[: self.n_frozen or 0]:
                hidden = block(hidden)
        return hidden

    def suffix(self, hidden: Tensor) -> Tensor:
        """What the live adapter hands to the head: ``(batch, n_tokens or 1, dim)``.

        :param hidden: what :meth:`prefix` returned, in any precision.
        """
        vit = self.transformer
        blocks = self.blocks[self.n_frozen or 0 :]
        last = blocks.pop() if blocks and answers_by_class_token(vit) else None
        # Kept in fewer bits, perhaps; the residual stream has those of the weights.
        hidden = hidden.to(next(vit.parameters()).dtype)
        if vit.grad_checkpointing:
            hidden = checkpoint_seq(blocks, hidden)
        else:
            for block in blocks:
                hidden = block(hidden)
        if last is not None:
            hidden = class_token_of(last, hidden)
        return vit.norm(hidden)

    def features(self, x: Tensor) -> Tensor:
        """What the live adapter hands to the classifier, ``(batch, dim)``.

        :param x: as for :meth:`live`.
        """
        with self.autocasting():
            features = self.transformer.forward_head(self.suffix(self.hidden(x)), pre_logits=True)
            return self.full_precision(features)

    def live(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits of the live adapter, ``(batch, n_classes)``.

        :param x: images ``(batch, channels, height, width)``, or what :meth:`prefix` has made of
            them, ``(batch, n_tokens, dim)``.
        """
        with self.autocasting():
            return self.full_precision(self.transformer.forward_head(self.suffix(self.hidden(x))))

    def hidden(self, x: Tensor) -> Tensor:
        """What the prefix makes of images, or has made of them already.

        :param x: as for :meth:`live`.
        """
        return self.prefix(x) if x.ndim == 4 else x
