"""Vision transformers with prompts: tokens before the input, or prefixes of the attention.

The backbone is frozen and always in evaluation mode; only prompts, keys and the classifier are
trained. In prompt tuning (L2P) tokens are added; in prefix tuning (DualPrompt, HiDe-Prompt) keys
and values are prepended inside the attention, and no token is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.adapters import find_classifier
from treelora_avalanche.adapters.trainable_view import at_least_float32
from treelora_avalanche.models.prompts.pools import (
    DualPrompted,
    PromptPool,
    TaskPrompts,
    check_dual_prompts,
    check_layers,
    check_length,
    check_momentum,
)
from treelora_avalanche.models.views.router import RoutedView, Router


def check_vision_transformer(
    model: nn.Module, method: str, *, or_language: bool = False
) -> VisionTransformer:
    """Returns the model, if it is a timm vision transformer that a prompt method supports.

    :param model: the pretrained model.
    :param method: name of the method, for the error.
    :param or_language: whether the method supports language models too, for the error.
    :raises ValueError: if it is another kind of model, or has no classifier.
    """
    if not isinstance(model, VisionTransformer) or isinstance(model, VisionTransformerDistilled):
        other = ", or a LanguageModel, such as create_language_model gives" if or_language else ""
        raise ValueError(
            f"`model` should be a VisionTransformer of timm for {method}, but is a "
            f"{type(model).__name__}. Pass one such as timm.create_model('vit_base_patch16_224')"
            f"{other}."
        )
    if find_classifier(model) is None:
        raise ValueError(
            "`model` should have a linear classifier, but has none. Make it with num_classes above "
            "0."
        )
    return model


def attend_with_prefix(attention: Attention, hidden: Tensor, prefix: Tensor) -> Tensor:
    """Returns the self-attention to the tokens and to a prefix before them (prefix tuning).

    ``softmax(q [p_k; k]^T / sqrt(head_dim)) [p_v; v]``; the number of tokens stays the same.

    :param attention: attention of a timm block.
    :param hidden: ``(batch, n_tokens, dim)``.
    :param prefix: keys and values of every head, ``(batch or 1, 2, length, n_heads, head_dim)``.
    :return: ``(batch, n_tokens, dim)``.
    """
    batch, n_tokens, _ = hidden.shape
    heads, head_dim = attention.num_heads, attention.head_dim
    qkv = attention.qkv(hidden).view(batch, n_tokens, 3, heads, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, n_heads, n_tokens, head_dim)
    q, k = attention.q_norm(q), attention.k_norm(k)
    prefix_k, prefix_v = prefix.expand(batch, *prefix.shape[1:]).transpose(2, 3).unbind(1)
    prefix_k, prefix_v = prefix_k.to(k.dtype), prefix_v.to(v.dtype)
    k, v = torch.cat((prefix_k, k), 2), torch.cat((prefix_v, v), 2)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attention.proj(attention.norm(mixed))


def block_with_prefix(block: Block, hidden: Tensor, prefix: Tensor) -> Tensor:
    """Returns the output of a frozen block whose attention sees a prefix.

    :param block: a block of a timm vision transformer, in evaluation mode.
    :param hidden: ``(batch, n_tokens, dim)``.
    :param prefix: see :func:`attend_with_prefix`.
    """
    hidden = hidden + block.ls1(
        attend_with_prefix(cast(Attention, block.attn), block.norm1(hidden), prefix)
    )
    return hidden + block.ls2(block.mlp(block.norm2(hidden)))


class PromptedViT(nn.Module):
    """Frozen vision transformer with a trainable classifier; base of the models with prompts.

    The backbone's features without prompts are the query by which prompts are selected::

        PromptedViT(vit).query(images)  # (batch, dim)

    :param vit: the pretrained transformer, which is frozen in place.
    """

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit.requires_grad_(False)
        vit.head.requires_grad_(True)
        self.vit.eval()

    def get_classifier(self) -> nn.Module:
        """Returns the classifier; the name is timm's."""
        return self.vit.head

    def train(self, mode: bool = True) -> PromptedViT:
        """Sets the mode; the frozen backbone stays in evaluation mode, without dropout.

        :param mode: whether to train.
        """
        super().train(mode)
        self.vit.eval()
        return self

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """Returns the backbone's features without prompts (of the class token), ``(batch, dim)``.

        :param images: a batch of preprocessed images.
        """
        features = self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)
        return at_least_float32(features)

    def _embed(self, images: Tensor) -> Tensor:
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


class PromptTunedViT(PromptedViT):
    """Puts the prompts that each sample picks before its tokens, as L2P does.

    Prompts have no position embedding. The input of the classifier is the mean of the outputs at
    the prompts (L2P, Section 4.2), not the class token::

        pool = PromptPool(pool_size=10, length=5, top_k=5, dim=vit.embed_dim)
        logits = PromptTunedViT(vit, pool)(images)

    :param vit: the pretrained transformer.
    :param pool: the prompts.
    """

    key_distance: Tensor | None = None
    """Key distance of the last batch in training mode, see :meth:`PromptPool.distance`."""

    def __init__(self, vit: VisionTransformer, pool: PromptPool):
        super().__init__(vit)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        queries = self.query(images)
        picks = self.pool.pick(queries)
        if self.training:
            self.key_distance = self.pool.distance(queries, picks)
        prompts = self.pool.take(picks)
        tokens = self._embed(images)
        hidden = self.vit.norm(self.vit.blocks(torch.cat((prompts.to(tokens.dtype), tokens), 1)))
        return self.vit.head(self.vit.fc_norm(hidden[:, : prompts.shape[1]].mean(1)))


class PrefixTunedViT(PromptedViT):
    """Vision transformer some of whose blocks attend to prefixes::

        model = PrefixTunedViT(vit)
        prefix = torch.zeros(1, *model.prefix_shape(1, 5)[1:])
        logits = model.forward_with_prefixes(images, {0: prefix})

    :param vit: the pretrained transformer.
    :raises ValueError: if its blocks are not timm's plain ones.
    """

    def __init__(self, vit: VisionTransformer):
        for block in vit.blocks:
            plain = type(block) is Block and type(block.attn) is Attention
            if not plain or getattr(block.attn, "gate", None) is not None:
                raise ValueError(
                    "`model` should have the blocks of timm's plain vision transformers for "
                    f"prefixes, but has {type(block).__name__} with "
                    f"{type(getattr(block, 'attn', None)).__name__}. Pass one such as "
                    "'vit_base_patch16_224'."
                )
        super().__init__(vit)

    def prefix_shape(self, n_layers: int, length: int) -> tuple[int, ...]:
        """Returns the shape of the prefixes of several blocks.

        :param n_layers: number of blocks.
        :param length: number of positions that a prefix adds.
        :return: ``(n_layers, 2, length, n_heads, head_dim)``: keys and values.
        """
        attention: Any = self.vit.blocks[0].attn
        return n_layers, 2, length, attention.num_heads, attention.head_dim

    def forward_with_prefixes(self, images: Tensor, prefixes: Mapping[int, Tensor]) -> Tensor:
        """Returns the logits under prefixes.

        :param images: a batch of preprocessed images.
        :param prefixes: prefixes by block number, see :func:`attend_with_prefix`.
        """
        hidden = self._embed(images)
        for number, block in enumerate(self.vit.blocks):
            if number in prefixes:
                hidden = block_with_prefix(cast(Block, block), hidden, prefixes[number])
            else:
                hidden = block(hidden)
        features = self.vit.forward_head(self.vit.norm(hidden), pre_logits=True)
        return self.vit.head(features)


class DualPromptedViT(PrefixTunedViT, DualPrompted):
    """Vision transformer with DualPrompt's general and expert prefixes, see :class:`DualPrompted`::

        model = DualPromptedViT(
            vit, general_layers=(0, 1), general_length=5, expert_layers=(2, 3, 4), expert_length=20
        )
        logits = model(images)

    :param vit: the pretrained transformer.
    :param general_layers: block numbers of the general prompts.
    :param general_length: their length.
    :param expert_layers: block numbers of the expert prompts.
    :param expert_length: their length.
    :raises ValueError: if an argument is out of range; the transformer is then unchanged.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        general_layers: tuple[int, ...],
        general_length: int,
        expert_layers: tuple[int, ...],
        expert_length: int,
    ):
        check_dual_prompts(
            general_layers=general_layers,
            general_length=general_length,
            expert_layers=expert_layers,
            expert_length=expert_length,
            n_layers=len(vit.blocks),
        )
        super().__init__(vit)
        self.general_layers, self.expert_layers = general_layers, expert_layers
        general = torch.empty(*self.prefix_shape(len(general_layers), general_length))
        self.general = nn.Parameter(general.uniform_(-1, 1))
        self.experts = TaskPrompts(
            self.prefix_shape(len(expert_layers), expert_length), key_dim=vit.num_features
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_prefixes(images, self.prefixes(self.query(images)))


class TaskPromptedViT(PrefixTunedViT):
    """Vision transformer with HiDe-Prompt's prefixes, one per task; by default the active one::

        model = TaskPromptedViT(vit, layers=(0, 1, 2, 3, 4), length=20, momentum=0.1)
        logits = model(images)
        logits = model(images, model.prompts.stacked()[tasks])  # those of other tasks

    :param vit: the pretrained transformer.
    :param layers: block numbers of the prompts.
    :param length: their length.
    :param momentum: see :class:`TaskPrompts`.
    :raises ValueError: if an argument is out of range; the transformer is then unchanged.
    """

    def __init__(
        self, vit: VisionTransformer, *, layers: tuple[int, ...], length: int, momentum: float
    ):
        check_length("prompt_length", length)
        check_momentum(momentum)
        check_layers("prompt_layers", layers, len(vit.blocks))
        super().__init__(vit)
        self.layers = layers
        self.prompts = TaskPrompts(self.prefix_shape(len(layers), length), momentum=momentum)

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        if prompts is None:
            prompts = self.prompts.current()[None]
        return self.forward_with_prefixes(
            images, dict(zip(self.layers, prompts.unbind(1), strict=True))
        )


class RoutedPrompts(RoutedView):
    """Routes each sample to the prompt of a task, by the frozen backbone's features.

    Costs two passes, the frozen one for the router, and one with each sample's prompt::

        view = RoutedPrompts(TaskPromptedViT(vit, layers=(0, 1), length=20, momentum=0))
        view.router = router
        logits = view.eval()(images)

    :param module: the transformer with its prompts.
    """

    module: TaskPromptedViT

    def routed(self, images: Tensor, router: Router) -> Tensor:
        with self.autocasting():
            chosen = router(self.module.query(images))
            return self.full_precision(self.module(images, self.module.prompts.stacked()[chosen]))

    def frozen_features(self, images: Tensor) -> Tensor:
        with self.autocasting():
            return self.module.query(images)
