"""Language model, split into its frozen decoder layers and the rest.

The model's own forward pass runs unchanged, whatever its embeddings, masks and arguments of layers:
skipped layers return their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.tokens import PADDING, crop, real_tokens
from treelora_avalanche.models.views.split import SplitView


def supports_split(model: nn.Module) -> TypeGuard[LanguageModel]:
    """Returns whether a model can be split: a language model with a list of decoder layers.

    :param model: any model.
    """
    return (
        isinstance(model, LanguageModel)
        and type(model).forward is LanguageModel.forward
        and type(model).logits is LanguageModel.logits
        and decoder_layers(model) is not None
    )


def decoder_layers(model: LanguageModel) -> nn.ModuleList | None:
    """Returns the decoder layers of a language model, from the input side to the output side.

    :param model: a language model, with or without LoRA.
    :return: its first list of as many modules as the configuration has layers; None if there is
        none.
    """
    n_layers = model.base.config.get_text_config().num_hidden_layers
    for module in model.base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    return None


def frozen_layers(model: LanguageModel) -> int | None:
    """Returns the number of decoder layers below the lowest one with a trainable parameter.

    :param model: a language model.
    :return: None where anything but decoder layers and output layer is trainable, as it may lie
        below them.
    """
    layers = decoder_layers(model)
    if layers is None:
        return None

    def trained(module: nn.Module) -> set[nn.Parameter]:
        return {p for p in module.parameters() if p.requires_grad}

    if trained(model.base) - trained(layers) - trained(model.base.get_output_embeddings()):
        return None
    if trained(model.base.get_input_embeddings()):  # tied to the output layer
        return None
    return next((n for n, layer in enumerate(layers) if trained(layer)), 0)


@contextmanager
def replaced(layers: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the forward pass of layers, and restores their own at the end.

    :param layers: the layers.
    :param forward: takes what the layers take.
    """
    before = [(layer, layer.__dict__.get("forward"), layer._compiled_call_impl) for layer in layers]
    for layer, *_ in before:
        layer.forward = forward
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, own, compiled in before:
            layer._compiled_call_impl = compiled
            if own is None:
                del layer.forward  # uncovers the method of the class
            else:
                layer.forward = own  # accelerate's, for one


class SplitLanguageModel(SplitView):
    """Splits a language model at the first trainable decoder layer.

    Hidden states ``(batch, length, dim)``, padded on the right with NaN, stand in place of token
    ids. As a causal model never looks to the right, they depend neither on the padding nor on the
    other samples of the batch, up to rounding::

        view = SplitLanguageModel(add_lora(model, layers="last:2"))
        hidden = view.frozen_output(tokens)  # (batch, length, dim)
        logits = view(hidden)  # (batch, vocabulary, length)

    :param module: a language model with LoRA.
    """

    module: LanguageModel

    def __init__(self, module: LanguageModel):
        super().__init__(module)
        self._in_tuple = False

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers, from the input side to the output side."""
        return list(decoder_layers(self.module) or ())

    @property
    def weight_dtype(self) -> torch.dtype:
        """Precision of the weights, and of the residual stream."""
        embeddings: nn.Embedding = self.module.base.get_input_embeddings()
        return embeddings.weight.dtype

    def count_frozen(self) -> int | None:
        """Returns the number of frozen layers, see :func:`frozen_layers`."""
        return frozen_layers(self.module)

    def frozen_output(self, x: Tensor) -> Tensor:
        """Returns the output of the frozen layers, without gradients: ``(batch, length, dim)``.

        At padding it is NaN.

        :param x: token ids, padded on the right with -1, ``(batch, length)``.
        """
        return self.output_below(x, self.n_frozen or 0)

    def output_below(self, x: Tensor, n_layers: int) -> Tensor:
        """Returns the output of the lowest layers, without gradients: ``(batch, length, dim)``.

        The layers above are not computed. At padding it is NaN.

        :param x: token ids, padded on the right with -1, ``(batch, length)``.
        :param n_layers: number of layers, below that of the model.
        """
        layers = self.blocks
        reached: list[Tensor] = []

        def record(hidden: Tensor, *_: Any, **__: Any) -> Any:
            reached.append(hidden)
            return self._layer_output(hidden)

        def note_form(_: nn.Module, __: Any, output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)  # of some models, and of older versions

        hook = layers[0].register_forward_hook(note_form)
        try:
            with torch.no_grad(), self.autocasting(), replaced(layers[n_layers:], record):
                self.module.logits(x, last=1)
        finally:
            hook.remove()
        return reached[0].masked_fill(x[..., None] == PADDING, torch.nan)

    def forward_active(self, x: Tensor, last: int | None = None) -> Tensor:  # type: ignore[override]
        """Returns the logits under the active adapter, see :meth:`LanguageModel.forward`.

        :param x: token ids ``(batch, length)``, or the output of the frozen layers for them,
            ``(batch, length, dim)``.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
        """
        if x.ndim == 2:
            logits: Tensor = super().forward_active(x, last)
            return logits
        if x.device.type == "cpu" or x.shape[1] >= self.module.max_length:
            x = crop(x)  # as the model does with tokens
        return self.logits_above(x, last)

    def logits_above(self, x: Tensor, last: int | None = None) -> Tensor:
        """Returns the logits for the output of the frozen layers, none of it cropped.

        :param x: ``(batch, length, dim)``.
        :param last: see :meth:`forward_active`.
        """
        real = real_tokens(x)
        # Perhaps cached in fewer bits than the residual stream has. The value at padding affects no
        # output, but has to be a number.
        hidden = x.to(self.weight_dtype).masked_fill(~real[..., None], 0)

        def given(*_: Any, **__: Any) -> Any:
            return self._layer_output(hidden)

        layers = self.blocks
        tokens = real.long() - 1  # any token: 0, or padding
        with self.autocasting(), replaced(layers[: self.n_frozen], given):
            return self.module.logits(tokens, last)

    def _layer_output(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which the model's layers return them."""
        return (hidden,) if self._in_tuple else hidden
