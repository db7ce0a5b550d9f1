"""What a task looks like to the frozen backbone: its signature before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.adapters import LoRAFactors, TrainableView, lora_layers
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.tokens import real_tokens


def activation_signature(
    model: nn.Module, samples: Tensor, size: int = 256, seed: int = 0
) -> Tensor:
    """Mean of what the frozen backbone hands to each adapted layer, as a direction.

    The gradient of a layer is the sum over tokens of (gradient of its output) x (its input)^T. The
    inputs are the half of it that takes neither labels, nor a head, nor a backward pass; under the
    frozen backbone they are the same whatever has been trained before, so the signatures of all
    tasks are comparable. ``benchmarks/task_signatures.py`` compares them with others.

    :param model: a model with LoRA; its factors are as they were afterwards.
    :param samples: a batch of a task, on the model's device. Padding in rows of tokens (-1) is left
        out of the mean.
    :param size: number of coordinates kept per layer, drawn at random; all of them in a narrower
        layer.
    :param seed: seed of the coordinates; equal seeds give equal ones.
    :return: ``(n_layers, size)``; each row is divided by its L1 norm.
    """
    factors = LoRAFactors(model)
    size = min(size, *(shape.n_in for shape in factors.shapes))
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(s.n_in, generator=generator)[:size].sort()[0] for s in factors.shapes]
    live = factors.stack.clone()
    means: list[Tensor] = []

    def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        activations = inputs[0]  # (batch, n_tokens, n_in)
        if samples.ndim == 4:  # images
            rows = activations.flatten(0, -2)
        else:
            rows = activations[real_tokens(samples)[:, : activations.shape[1]]]
        means.append(rows.mean(0)[drawn[len(means)].to(rows.device)])

    layers = [model.get_submodule(name) for name in lora_layers(model)]
    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    try:
        with evaluating(model):
            factors.stack.zero_()  # LoRA's output is BA x: without factors the model is frozen
            _answer(model, samples)
    finally:
        factors.stack.copy_(live)
        for hook in hooks:
            hook.remove()
    return F.normalize(torch.stack(means).to(live.dtype), p=1.0, dim=1)


def features_of(model: nn.Module, samples: Tensor) -> Tensor:
    """What a model hands to its linear classifier, under the live adapter.

    :param model: a model with a linear classifier.
    :param samples: one batch, on the model's device.
    :return: ``(batch, dim)``.
    """
    features: list[Tensor] = []
    hook = classifier_of(model).register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0])
    )
    try:
        with evaluating(model):
            _answer(model, samples)
    finally:
        hook.remove()
    return features[0]


def stack_samples(dataset: Sequence[tuple[Tensor, ...]], rows: Sequence[int]) -> list[Tensor]:
    """Some samples of a dataset as one batch.

    :param dataset: samples of an input, a target and what may follow.
    :param rows: which of them.
    :return: the inputs ``(n, ...)`` and the targets ``(n, ...)``.
    """
    pairs = [dataset[row][:2] for row in rows]
    columns = zip(*pairs, strict=True)
    return [torch.stack([torch.as_tensor(part) for part in column]) for column in columns]


def _answer(model: nn.Module, samples: Tensor) -> None:
    # A view may route its samples elsewhere; asked is the live adapter.
    (model.live if isinstance(model, TrainableView) else model)(samples)
