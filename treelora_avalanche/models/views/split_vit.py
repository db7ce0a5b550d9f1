"""Vision transformer, split into its frozen blocks and the rest."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.views.split import SplitView

_AFTER_EMBEDDING = ("blocks.", "norm.", "attn_pool.", "fc_norm.", "head.")


def find_transformer(model: nn.Module) -> VisionTransformer | None:
    """Returns the timm vision transformer in a model, if it has timm's own forward pass.

    :param model: a plain model, or one with LoRA; with or without a view.
    :return: None where there is none.
    """
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            return module if _has_own(module, "forward", "forward_features") else None
    return None


def _has_own(vit: VisionTransformer, *methods: str) -> bool:
    """Returns whether a transformer has timm's own methods, and not those of a subclass."""
    return all(getattr(type(vit), name) is getattr(VisionTransformer, name) for name in methods)


def trainable_view(model: nn.Module) -> TrainableView:
    """Returns a :class:`SplitViT` of a timm vision transformer, a :class:`TrainableView` else.

    :param model: a model with LoRA.
    """
    return SplitViT(model) if is_transformer(model) else TrainableView(model)


def is_transformer(model: nn.Module) -> bool:
    """Returns whether a model is a timm vision transformer, and not a module that contains one.

    :param model: a plain model, or one with LoRA.
    """
    vit = find_transformer(model)
    # A module around it computes more, which a view of the transformer would leave out.
    return vit is not None and vit is (
        model.get_base_model() if isinstance(model, PeftModel) else model
    )


def frozen_blocks(vit: VisionTransformer) -> int | None:
    """Returns the number of blocks below the lowest one with a trainable parameter.

    :param vit: the transformer.
    :return: 0 where that is the first block; None where the patch embedding is trainable.
    """
    lowest = len(vit.blocks)
    for name, parameter in vit.named_parameters():
        if parameter.requires_grad:
            if not name.startswith(_AFTER_EMBEDDING):
                return None
            if name.startswith("blocks."):
                lowest = min(lowest, int(name.split(".")[1]))
    return lowest


def head_reads_class_token(vit: VisionTransformer) -> bool:
    """Returns whether the head reads the output of the last block at the class token alone.

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
    """Returns the output of a block at the class token.

    Its keys and values come from all tokens; its query, and all that follows, from one.

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
    # For a single query the fused attention is not faster, and in bf16 on a CPU far slower.
    scores = (attention.scale * attention.q_norm(q[:, :, :1])) @ attention.k_norm(k).mT
    mixed = attention.attn_drop(scores.softmax(-1)) @ v  # (batch, n_heads, 1, head_dim)
    mixed = attention.norm(mixed.transpose(1, 2).flatten(2))  # (batch, 1, dim)
    mixed = attention.proj_drop(attention.proj(mixed))
    token = hidden[:, :1] + at.drop_path1(at.ls1(mixed))
    return token + at.drop_path2(at.ls2(at.mlp(at.norm2(token))))


class SplitViT(SplitView):
    """Splits a timm vision transformer at the first trainable block.

    The frozen blocks run without gradients. Where the head reads nothing else, only the class
    token's output of the last block is computed. The logits are those of the model up to rounding::

        view = SplitViT(add_lora(vit, layers="last:3"))
        hidden = view.frozen_output(images)  # (batch, n_tokens, dim)
        logits = view(hidden)

    :param module: a peft model around a timm vision transformer.
    :raises ValueError: if there is no timm vision transformer in the model.
    """

    def __init__(self, module: nn.Module):
        if not is_transformer(module):
            raise ValueError(
                f"`module` ({type(module).__name__}) is no timm VisionTransformer with timm's own "
                "forward pass; use TrainableView."
            )
        super().__init__(module)

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
    def weight_dtype(self) -> torch.dtype:
        """Precision of the weights, and of the residual stream."""
        return next(self.transformer.parameters()).dtype

    def count_frozen(self) -> int | None:
        """Returns the number of frozen blocks, see :func:`frozen_blocks`."""
        return frozen_blocks(self.transformer)

    def frozen_output(self, x: Tensor) -> Tensor:
        """Returns the output of the frozen blocks, without gradients: ``(batch, n_tokens, dim)``.

        :param x: images, ``(batch, channels, height, width)``.
        """
        vit = self.transformer
        trained = torch.is_grad_enabled() and self.n_frozen is None
        with torch.set_grad_enabled(trained), self.autocasting():
            hidden = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
            for block in self.blocks[: self.n_frozen or 0]:
                hidden = block(hidden)
        return hidden

    def trained_output(self, hidden: Tensor) -> Tensor:
        """Returns the input of the head under the active adapter: ``(batch, n_tokens or 1, dim)``.

        :param hidden: output of the frozen blocks, in any precision.
        """
        vit = self.transformer
        blocks = self.blocks[self.n_frozen or 0 :]
        last = blocks.pop() if blocks and head_reads_class_token(vit) else None
        # Perhaps cached in fewer bits than the residual stream has.
        hidden = hidden.to(self.weight_dtype)
        if vit.grad_checkpointing:
            hidden = checkpoint_seq(blocks, hidden)
        else:
            for block in blocks:
                hidden = block(hidden)
        if last is not None:
            hidden = class_token_of(last, hidden)
        return vit.norm(hidden)

    def features(self, x: Tensor) -> Tensor:
        """Returns the input of the classifier under the active adapter, ``(batch, dim)``.

        :param x: as for :meth:`forward_active`.
        """
        return self._head_output(x, pre_logits=True)

    def forward_active(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the logits under the active adapter, ``(batch, n_classes)``.

        :param x: images ``(batch, channels, height, width)``, or the output of the frozen blocks
            for them, ``(batch, n_tokens, dim)``.
        """
        return self._head_output(x, pre_logits=False)

    def _head_output(self, x: Tensor, pre_logits: bool) -> Tensor:
        with self.autocasting():
            last = self.trained_output(self.hidden(x))
            output = self.transformer.forward_head(last, pre_logits=pre_logits)
            return cast(Tensor, self.full_precision(output))

    def hidden(self, x: Tensor) -> Tensor:
        """Returns the output of the frozen blocks for images, or ``x`` if it is that already.

        :param x: as for :meth:`forward_active`.
        """
        return self.frozen_output(x) if x.ndim == 4 else x
