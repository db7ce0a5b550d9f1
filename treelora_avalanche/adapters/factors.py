"""LoRA factors of all adapted layers as one matrix, and the signatures of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters.attach import lora_layers


class LayerShape(NamedTuple):
    """Shapes of one layer's factors: A is ``(rank, n_in)`` and B ``(n_out, rank)``.

    Of a convolution, n_in counts the values under its kernel, ``channels * height * width``.

    >>> LayerShape(rank=4, n_in=768, n_out=2304).size
    12288
    """

    rank: int
    n_in: int
    n_out: int

    @property
    def size(self) -> int:
        """Number of values in A and B together."""
        return self.rank * (self.n_in + self.n_out)

    def split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Returns views of A ``(rank, n_in)`` and B ``(n_out, rank)`` in a row ``(dim,)``."""
        n_a = self.rank * self.n_in
        return (
            row[:n_a].view(self.rank, self.n_in),
            row[n_a : self.size].view(self.n_out, self.rank),
        )


def active_factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns A ``(rank, n_in)`` and B ``(n_out, rank)`` of a layer's active adapter.

    Of a convolution, A is ``(rank, channels, height, width)`` and B ``(n_out, rank, 1, 1)``.

    :param layer: a LoRA layer of peft.
    """
    adapter = layer.active_adapters[0]
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return a.get_parameter("weight"), b.get_parameter("weight")


def check_linear(model: nn.Module, purpose: str) -> None:
    """Raises an error for LoRA on other layers than linear ones, such as convolutions.

    :param model: a model that carries LoRA.
    :param purpose: what needs linear layers, for the error.
    :raises ValueError: if a factor is no matrix.
    """
    for name, layer in lora_layers(model).items():
        if any(factor.ndim != 2 for factor in active_factors(layer)):
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(
                f"`model` should carry LoRA on linear layers alone for {purpose}, but "
                f"`{name.rpartition('base_model.model.')[2]}` is a {kind}. Leave it out of the "
                "LoraConfig's `target_modules`, or use a method such as SeqLoRA or TreeLoRA."
            )


class LoRAFactors:
    """The active LoRA factors of a model as one tensor ``(n_layers, dim)``, without copies.

    The parameters become views into :attr:`stack`, so that the optimizer's updates appear there,
    and values written there are used by the model. Layers with fewer than ``dim`` values are padded
    with zeros. All instances for one model share one stack::

        factors = LoRAFactors(add_lora(vit))
        theta = factors.stack.clone()  # (n_layers, dim)
        factors.stack.copy_(bank[3])  # the model now uses adapter 3

    :param model: a model that carries LoRA layers of peft.
    :raises ValueError: if it carries none.
    """

    def __init__(self, model: nn.Module):
        layers = lora_layers(model)
        if not layers:
            raise ValueError(
                f"`model` should carry LoRA layers, but this {type(model).__name__} has none. "
                "Attach them first with treelora_avalanche.adapters.add_lora(model)."
            )
        self.names = list(layers)
        self.parameters: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.shapes: list[LayerShape] = []
        for layer in layers.values():
            a, b = active_factors(layer)
            self.parameters.append((a, b))
            self.shapes.append(LayerShape(len(a), a[0].numel(), len(b)))
        self.dim = max(shape.size for shape in self.shapes)
        self.stack: Tensor = self._shared_stack()

    def zero_(self) -> None:
        """Sets all factors to zero, so that the model is the frozen one: LoRA's output is BA x."""
        self.stack.zero_()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the factors, which the body of the context may change, at its end."""
        before = self.stack.clone()
        try:
            yield
        finally:
            self.stack.copy_(before)

    def _shared_stack(self) -> Tensor:
        first = self.parameters[0][0].data
        storage = first.untyped_storage()
        stack = first.new_empty(0)
        if storage.nbytes() == len(self.shapes) * self.dim * first.element_size():
            stack.set_(storage, 0, (len(self.shapes), self.dim))  # type: ignore[call-overload]
            if all(p.data_ptr() == v.data_ptr() for p, v in self._parameters_and_views(stack)):
                return stack
        stack = first.new_zeros(len(self.shapes), self.dim)  # (n_layers, dim)
        for parameter, view in self._parameters_and_views(stack):
            view.copy_(parameter.data)
            parameter.data = view
        return stack

    def _parameters_and_views(self, stack: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for row, shape, pair in zip(stack, self.shapes, self.parameters, strict=True):
            for parameter, view in zip(pair, shape.split(row), strict=True):
                yield parameter, view.view(parameter.shape)


class SignatureSketch:
    """Fixed random sample of every layer's coordinates, from which L1 distances are estimated.

    The L1 distance over a uniform sample of coordinates, divided by the sampled share, is an
    unbiased estimate of the L1 distance over all of them, and reads ``size`` numbers per layer,
    whatever the size of the layer. ``benchmarks/signature_sketch.py`` compares it with random
    projections::

        sketch = SignatureSketch(factors.shapes, size=256)
        start = sketch(factors.stack)  # (n_layers, 256)
        sketch.direction(factors.stack, start)  # after training

    :param shapes: shapes of the layers' factors.
    :param size: number of coordinates per layer (all of them in a smaller layer).
    :param seed: seed of the sample; equal seeds give equal samples.
    :param device: device of the factors.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        size: int = 256,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        size = min(size, *(shape.size for shape in shapes))
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(s.size, generator=generator)[:size].sort().values for s in shapes]
        self.coordinates = torch.stack(rows).to(device)  # (n_layers, size)

    def __call__(self, factors: Tensor) -> Tensor:
        """Returns the sketch of factors ``(n_layers, dim)``, a new tensor ``(n_layers, size)``."""
        return factors.gather(1, self.coordinates)

    def direction(self, factors: Tensor, start: Tensor) -> Tensor:
        """Returns the signature of a task: the direction in which training moved the adapter.

        :param factors: the factors now, ``(n_layers, dim)``.
        :param start: the *sketch* of the factors at the start of the task, ``(n_layers, size)``.
        :return: displacement divided by its L1 norm, ``(n_layers, size)``; 0 where nothing moved.
        """
        return nn.functional.normalize(self(factors) - start, p=1.0, dim=1)
