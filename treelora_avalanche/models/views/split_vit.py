"""Vision transformer, split into its frozen blocks and the rest."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from timm.models import checkpoint, checkpoint_seq
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.views.class_token import (
    class_token_of,
    has_own,
    head_reads_class_token,
)
from treelora_avalanche.models.views.split import SplitView

_AFTER_EMBEDDING = ("blocks.", "norm.", "attn_pool.", "fc_norm.", "head.")


Transformer = VisionTransformer | Eva
"""Classes of timm; EVA-02, DINOv3 and other models with rotary embeddings are ``Eva``."""


def find_transformer(model: nn.Module) -> Transformer | None:
    """Returns the timm vision transformer in a model, if it has timm's own forward pass.

    Not one of class ``Eva`` that drops patches or jitters its rotary embeddings in training: each
    forward pass would draw others for its upper blocks.

    :param model: a plain model, or one with LoRA; with or without a view.
    :return: None where there is none.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            own = has_own(module, "forward", "forward_features")
            return module if own and not _draws_positions(module) else None
    return None


def _draws_positions(vit: Transformer) -> bool:
    return isinstance(vit, Eva) and (
        vit.patch_drop is not None or getattr(vit.rope, "aug_active", False)
    )


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


def frozen_blocks(vit: Transformer) -> int | None:
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


class Start(NamedTuple):
    """Output of the frozen blocks, and what the other blocks read next to it.

    :param hidden: ``(batch, n_tokens, dim)``.
    :param rope: rotary position embeddings of the patches, as timm passes them on; None where the
        model has none.
    """

    hidden: Tensor
    rope: Tensor | None = None


class SplitViT(SplitView):
    """Splits a timm vision transformer at the first trainable block.

    It is one of class ``VisionTransformer`` or ``Eva``. The frozen blocks run without gradients.
    Where the head reads nothing else, only the class token's output of the last block is computed.
    The logits are those of the model up to rounding::

        view = SplitViT(add_lora(vit, layers="last:3"))
        hidden = view.frozen_output(images)  # (batch, n_tokens, dim)
        logits = view(hidden)

    :param module: a peft model around a timm vision transformer.
    :raises ValueError: if there is no timm vision transformer in the model.
    """

    def __init__(self, module: nn.Module):
        if not is_transformer(module):
            raise ValueError(
                f"`module` ({type(module).__name__}) is no timm VisionTransformer or Eva with "
                "timm's own forward pass; use TrainableView."
            )
        super().__init__(module)

    @property
    def transformer(self) -> Transformer:
        """The transformer inside the peft model."""
        # Not kept: as a second submodule it would give every parameter a second name.
        return cast(Transformer, find_transformer(self.module))

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

    def agrees(self, x: Tensor) -> bool:
        """Returns whether hidden states alone determine the rest of the forward pass.

        Not so for images of another size than the model's, whose rotary embeddings differ.

        :param x: a batch of images.
        """
        vit = self.transformer
        if not isinstance(vit, Eva):
            return True
        grid = vit.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return bool(grid == vit.patch_embed.grid_size)

    def frozen_output(self, x: Tensor) -> Tensor:
        """Returns the output of the frozen blocks, without gradients: ``(batch, n_tokens, dim)``.

        :param x: images, ``(batch, channels, height, width)``.
        """
        return self.start(x).hidden

    def start(self, x: Tensor) -> Start:
        """Returns the output of the frozen blocks, with the rotary embeddings of the images.

        :param x: images; or the output of the frozen blocks for images of the model's own size.
        """
        if x.ndim != 4:
            return Start(x, _rope_of(self.transformer))
        trained = torch.is_grad_enabled() and self.n_frozen is None
        with torch.set_grad_enabled(trained), self.autocasting():
            start = _embed(self.transformer, x)
            return start._replace(hidden=self._run(start, 0, self.n_frozen or 0))

    def _run(self, start: Start, first: int, last: int) -> Tensor:
        """Returns the output of the blocks from ``first`` to the one before ``last``."""
        hidden, vit = start.hidden, self.transformer
        for number in range(first, last):
            block = vit.blocks[number]
            if isinstance(vit, Eva):
                hidden = block(hidden, rope=_rope_at(vit, start.rope, number))
            else:
                hidden = block(hidden)
        return hidden

    def _run_checkpointed(self, start: Start, first: int, last: int) -> Tensor:
        hidden, vit = start.hidden, self.transformer
        if not isinstance(vit, Eva):
            return cast(Tensor, checkpoint_seq(vit.blocks[first:last], hidden))
        for number in range(first, last):
            rope = _rope_at(vit, start.rope, number)
            hidden = checkpoint(vit.blocks[number], hidden, rope=rope)
        return hidden

    def trained_output(self, start: Start) -> Tensor:
        """Returns the input of the head under the active adapter: ``(batch, n_tokens or 1, dim)``.

        :param start: output of the frozen blocks, in any precision.
        """
        vit = self.transformer
        first, last = self.n_frozen or 0, len(vit.blocks)
        shortens = first < last and head_reads_class_token(vit)
        # Perhaps cached in fewer bits than the residual stream has.
        start = start._replace(hidden=start.hidden.to(self.weight_dtype))
        run = self._run_checkpointed if vit.grad_checkpointing else self._run
        hidden = run(start, first, last - shortens)
        if shortens:
            hidden = class_token_of(vit.blocks[-1], hidden, _rope_at(vit, start.rope, last - 1))
        return cast(Tensor, vit.norm(hidden))

    def features(self, x: Tensor | Start) -> Tensor:
        """Returns the input of the classifier under the active adapter, ``(batch, dim)``.

        :param x: as for :meth:`forward_active`.
        """
        return self._head_output(x, pre_logits=True)

    def forward_active(self, x: Tensor | Start) -> Tensor:  # type: ignore[override]
        """Returns the logits under the active adapter, ``(batch, n_classes)``.

        :param x: images ``(batch, channels, height, width)``, or the output of the frozen blocks
            for them, ``(batch, n_tokens, dim)`` or :class:`Start`.
        """
        return self._head_output(x, pre_logits=False)

    def _head_output(self, x: Tensor | Start, pre_logits: bool) -> Tensor:
        with self.autocasting():
            last = self.trained_output(x if isinstance(x, Start) else self.start(x))
            output = self.transformer.forward_head(last, pre_logits=pre_logits)
            return cast(Tensor, self.full_precision(output))


def _embed(vit: Transformer, images: Tensor) -> Start:
    """Returns the input of the first block."""
    tokens = vit.patch_embed(images)
    if isinstance(vit, Eva):
        hidden, rope = vit._pos_embed(tokens)
        return Start(vit.norm_pre(hidden), rope)
    return Start(vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens))))


def _rope_of(vit: Transformer) -> Tensor | None:
    """Returns the rotary embeddings of images of the model's own size, as timm computes them."""
    rope: Any = vit.rope if isinstance(vit, Eva) else None
    if rope is None:
        return None
    kept = hasattr(rope, "feat_shape") and not vit.dynamic_img_size
    shape = {} if kept else {"shape": vit.patch_embed.grid_size}
    return cast(Tensor, rope.get_embed(**shape))


def _rope_at(vit: Transformer, rope: Tensor | None, number: int) -> Tensor | None:
    """Returns the rotary embeddings of a block, which some models have of its own."""
    return rope[number] if rope is not None and getattr(vit, "rope_mixed", False) else rope
