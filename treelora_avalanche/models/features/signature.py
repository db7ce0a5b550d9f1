"""Task signature from the frozen backbone's activations, before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.adapters import LoRAFactors, lora_layers
from treelora_avalanche.adapters.factors import check_linear
from treelora_avalanche.adapters.trainable_view import active_forward, evaluating
from treelora_avalanche.models.token_batches import collate_hidden_states
from treelora_avalanche.models.tokens import real_tokens


def activation_signature(
    model: nn.Module, samples: Tensor, size: int = 256, seed: int = 0
) -> Tensor:
    """Returns the mean input of each adapted layer in the frozen backbone, as a direction.

    The gradient of a layer's weights is the sum over tokens of (gradient of its output) x
    (its input)^T. The inputs are the half of it that needs neither labels, nor a head, nor a
    backward pass; in the frozen backbone they do not depend on what has been trained before, so the
    signatures of all tasks are comparable. ``benchmarks/task_signatures.py`` compares them with
    others::

        activation_signature(model, images)  # (n_layers, 256)

    :param model: a model with LoRA; its factors are restored afterwards.
    :param samples: a batch of a task, on the model's device. Padding in token sequences (-1) is not
        in the mean.
    :param size: number of coordinates kept per layer, drawn at random; all of them in a narrower
        layer.
    :param seed: seed of the coordinates; equal seeds give equal ones.
    :return: ``(n_layers, size)``; each row is divided by its L1 norm.
    """
    check_linear(model, "signatures of activations")
    factors = LoRAFactors(model)
    size = min(size, *(shape.n_in for shape in factors.shapes))
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(s.n_in, generator=generator)[:size].sort()[0] for s in factors.shapes]
    means: list[Tensor] = []

    def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        activations = inputs[0]  # (batch, n_tokens, n_in)
        if samples.ndim == 4:  # images
            rows = activations.flatten(0, -2)
        else:
            rows = activations[real_tokens(samples)[:, : activations.shape[1]]]
        means.append(rows.to(factors.stack.dtype).mean(0)[drawn[len(means)].to(rows.device)])

    layers = [model.get_submodule(name) for name in lora_layers(model)]
    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    try:
        with evaluating(model), factors.restored():
            factors.zero_()
            active_forward(model)(samples)
    finally:
        for hook in hooks:
            hook.remove()
    return F.normalize(torch.stack(means), p=1.0, dim=1)


def stack_samples(dataset: Sequence[tuple[Tensor, ...]], rows: Sequence[int]) -> list[Tensor]:
    """Returns some samples of a dataset as one batch.

    :param dataset: samples of an input, a target, and perhaps more.
    :param rows: indices of the samples.
    :return: the inputs ``(n, ...)`` and the targets ``(n, ...)``.
    """
    pairs = [dataset[row][:2] for row in rows]
    if torch.as_tensor(pairs[0][1]).ndim and pairs[0][0].ndim == 2:
        # Hidden states of texts, of different lengths.
        return collate_hidden_states(pairs)[:2]
    columns = zip(*pairs, strict=True)
    return [torch.stack([torch.as_tensor(part) for part in column]) for column in columns]
