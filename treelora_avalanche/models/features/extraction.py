"""Extraction of features, the inputs of a model's classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.adapters.trainable_view import (
    active_forward,
    at_least_float32,
    evaluating,
)
from treelora_avalanche.processes import Processes, shared_work


@contextmanager
def recorded_features(model: nn.Module) -> Iterator[list[Tensor]]:
    """Records the features ``(batch, dim)`` of every forward pass inside the context.

    :param model: a model with a linear classifier.
    """
    features: list[Tensor] = []
    hook = classifier_of(model).register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0])
    )
    try:
        yield features
    finally:
        hook.remove()


def features_of(model: nn.Module, samples: Tensor) -> Tensor:
    """Returns the features of one batch under the active adapter, ``(batch, dim)``.

    :param model: a model with a linear classifier.
    :param samples: the batch, on the model's device.
    """
    with recorded_features(model) as features, evaluating(model):
        active_forward(model)(samples)
    return features[0]


def experience_features(
    strategy: Any, compute: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Returns :func:`extract_features` of a strategy's current training experience.

    The processes of distributed training divide the samples among them.

    :param strategy: the strategy.
    :param compute: see :func:`extract_features`.
    """
    return extract_features(
        strategy.model,
        strategy.experience.dataset.eval(),
        batch_size=strategy.eval_mb_size,
        device=strategy.device,
        processes=shared_work(strategy),
        compute=compute,
    )


def extract_features(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int,
    device: torch.device | str,
    processes: Processes | None = None,
    compute: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the features of all samples of a dataset, by default under the active adapter.

    :param model: any model with a linear classifier.
    :param dataset: samples whose first two elements are an image and its class.
    :param batch_size: samples per forward pass.
    :param device: device of the model.
    :param processes: processes that divide the samples among them; each gets all features.
    :param compute: function from a batch on the device to its features, called in evaluation mode;
        by default :func:`features_of` the model.
    :return: features ``(n_samples, dim)``, at least in float32, and classes ``(n_samples,)``; both
        on the device.
    """
    targets: list[Tensor] = []
    n_samples = len(dataset)
    if processes is not None:
        dataset = Subset(dataset, processes.part(n_samples, batch_size))
    compute = compute or partial(features_of, model)
    features: list[Tensor] = []
    with evaluating(model):
        for images, target, *_ in DataLoader(dataset, batch_size):
            features.append(compute(images.to(device)))
            targets.append(target.to(device))
    weight = classifier_of(model).weight
    found, classes = torch.cat(features).to(at_least_float32(weight).dtype), torch.cat(targets)
    if processes is not None:
        found, classes = (processes.whole(f, n_samples, batch_size) for f in (found, classes))
    return found, classes
