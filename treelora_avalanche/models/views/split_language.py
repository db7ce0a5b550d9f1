"""A language model in two parts: the decoder layers that nothing trains, and the rest.

The counterpart of :mod:`~treelora_avalanche.models.views.split_vit` for the models of transformers.
How a model embeds tokens, makes its masks and calls its layers is its own affair: it runs as it is,
and the layers of the other part hand on what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.tokens import PADDING, crop, real_tokens


def decoder_layers(model: LanguageModel) -> nn.ModuleList | None:
    """The decoder layers of a language model, from the input side to the output side.

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
    """Number of decoder layers below the lowest one with a trained parameter.

    :param model: a language model.
    :return: None where something else is trained beside layers and output layer, as what lies below
        them may be.
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
    """Gives layers another forward pass, and then their own again.

    :param layers: the layers.
    :param forward: called with what the layers are called with.
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
                del layer.forward  # the method of the class comes to light again
            else:
                layer.forward = own  # accelerate's, for one


class LanguagePrefixView(TrainableView):
    """The view of a language model that also takes what its frozen layers have computed.

    That stands in place of token ids: hidden states ``(batch, length, dim)``, padded on the right
    with NaN. As a causal model never looks to the right, what they are does not depend on the
    padding, nor on the other rows of the batch, up to rounding.

    :param module: a language model with LoRA.
    """

    module: LanguageModel

    def __init__(self, module: LanguageModel):
        super().__init__(module)
        self.n_settled = 0
        """Layers below the suffix though they have trained parameters: they are trained no more."""
        self.n_frozen = frozen_layers(module)
        """Layers of the prefix, see :func:`frozen_layers`; told anew when the mode is set."""
        self._in_tuple = False

    def train(self, mode: bool = True) -> LanguagePrefixView:
        """Sets the mode, see :meth:`torch.nn.Module.train`, and finds the prefix again."""
        n_frozen = frozen_layers(self.module)
        self.n_frozen = None if n_frozen is None else max(n_frozen, self.n_settled)
        super().train(mode)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles every layer by itself: which of them run is settled from outside.

        The arguments are those of :meth:`torch.nn.Module.compile`.
        """
        for layer in self.blocks:
            layer.compile(*args, **kwargs)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers, from the input side to the output side."""
        return list(decoder_layers(self.module) or ())

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the forward pass."""
        return self.autocast or self._stream_dtype

    @property
    def _stream_dtype(self) -> torch.dtype:
        embeddings: nn.Embedding = self.module.base.get_input_embeddings()
        return embeddings.weight.dtype

    def prefix(self, tokens: Tensor) -> Tensor:
        """What the frozen layers compute, without gradients: ``(batch, length, dim)``.

        At padding it is NaN.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        """
        layers = self.blocks
        reached: list[Tensor] = []

        def hand_on(hidden: Tensor, *_: Any, **__: Any) -> Any:
            reached.append(hidden)
            return self._form(hidden)

        def note(_: nn.Module, __: Any, output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)  # of some models, and of older versions

        hook = layers[0].register_forward_hook(note)
        try:
            with torch.no_grad(), self.autocasting(), replaced(layers[self.n_frozen :], hand_on):
                self.module.logits(tokens, last=1)
        finally:
            hook.remove()
        return reached[0].masked_fill(tokens[..., None] == PADDING, torch.nan)

    def live(self, x: Tensor, last: int | None = None) -> Tensor:  # type: ignore[override]
        """Logits of the live adapter, see :meth:`LanguageModel.forward`.

        :param x: token ids ``(batch, length)``, or what :meth:`prefix` has made of them, ``(batch,
            length, dim)``.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
        """
        if x.ndim == 2:
            logits: Tensor = super().live(x, last)
            return logits
        if x.device.type == "cpu" or x.shape[1] >= self.module.max_length:
            x = crop(x)  # as the model does with tokens
        real = real_tokens(x)
        # Kept in fewer bits, perhaps; the residual stream has those of the weights. What stands at
        # padding has no part in any answer, but has to be a number.
        hidden = x.to(self._stream_dtype).masked_fill(~real[..., None], 0)

        def given(*_: Any, **__: Any) -> Any:
            return self._form(hidden)

        layers = self.blocks
        tokens = real.long() - 1  # any token: 0, or padding
        with self.autocasting(), replaced(layers[: self.n_frozen], given):
            return self.module.logits(tokens, last)

    def _form(self, hidden: Tensor) -> Any:
        return (hidden,) if self._in_tuple else hidden

    def agrees(self, tokens: Tensor) -> bool:
        """Whether the two parts together answer as the whole model does.

        Not so where layers read more than hidden states: the tokens themselves, or what layers
        before them have left.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        """
        with evaluating(self):
            parts, whole = self.live(self.prefix(tokens)), self.live(tokens)
        return torch.allclose(parts, whole, rtol=1e-3, atol=1e-3)


def takes_parts(model: nn.Module) -> TypeGuard[LanguageModel]:
    """Whether a model is a language model whose forward pass is known in two parts.

    :param model: any model.
    """
    return (
        isinstance(model, LanguageModel)
        and type(model).forward is LanguageModel.forward
        and type(model).logits is LanguageModel.logits
        and decoder_layers(model) is not None
    )
