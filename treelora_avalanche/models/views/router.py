"""Routes every sample to one of the finished adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, TrainableView


class Router(NamedTuple):
    """Tells from the frozen backbone's features which adapter a sample belongs to.

    :param weight: ``(n_clusters, dim)``; a cluster is a class as one task has shown it.
    :param bias: ``(n_clusters,)``.
    :param adapter: index in the bank of each cluster's adapter, ``(n_clusters,)``.
    """

    weight: Tensor
    bias: Tensor
    adapter: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """The most probable adapter of each sample.

        :param features: frozen features, ``(batch, dim)``.
        :return: indices in the bank, ``(batch,)``.
        """
        probability = (features @ self.weight.T + self.bias).softmax(1)  # (batch, n_clusters)
        n_adapters = int(self.adapter.max()) + 1
        of_adapter = probability.new_zeros(len(features), n_adapters)
        return of_adapter.index_add_(1, self.adapter, probability).argmax(1)


class RoutedView(TrainableView):
    """The view of a model that, in evaluation mode, routes each sample to its adapter.

    A prediction does not depend on the rest of its batch. In training mode, or while there is no
    router, the live adapter answers.
    """

    router: Router | None = None
    """Set after every task by the :class:`~treelora_avalanche.plugins.RouterPlugin`."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        if self.training or self.router is None or not len(images):
            return self.live(images)
        return self.routed(images, self.router)

    def routed(self, images: Tensor, router: Router) -> Tensor:
        """Logits of samples, each answered by the adapter that the router takes it for.

        :param images: a batch of preprocessed images, at least one.
        :param router: the router.
        """
        raise NotImplementedError

    def frozen_features(self, images: Tensor) -> Tensor:
        """Features of the backbone without any adapter, ``(batch, dim)``.

        :param images: a batch of preprocessed images.
        """
        raise NotImplementedError


def answer_by_adapter(
    factors: LoRAFactors, bank: AdapterBank, chosen: Tensor, answer: Callable[[Tensor], Tensor]
) -> Tensor:
    """Answers of samples, those of each adapter together, with that adapter as the live one.

    :param factors: the live factors, which are overwritten; see :func:`restored`.
    :param bank: the adapters.
    :param chosen: index in the bank of each sample's adapter, ``(batch,)``.
    :param answer: from the numbers of some samples to what the live adapter answers to them.
    :return: the answers in the order of the samples, ``(batch, ...)``.
    """
    rows, answers = [], []
    for adapter in chosen.unique().tolist():
        rows.append((chosen == adapter).nonzero().squeeze(1))
        factors.stack.copy_(bank[adapter])
        answers.append(answer(rows[-1]))
    return torch.cat(answers)[torch.cat(rows).argsort()]


@contextmanager
def restored(factors: LoRAFactors) -> Iterator[None]:
    """Puts the live factors back, whatever happens.

    :param factors: the live factors.
    """
    live = factors.stack.clone()
    try:
        yield
    finally:
        factors.stack.copy_(live)
