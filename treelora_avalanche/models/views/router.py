"""Routing of each sample to one of the finished adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, TrainableView


class Router(NamedTuple):
    """Linear classifier of frozen features into clusters, each of which belongs to an adapter.

    >>> router = Router(torch.eye(3), torch.zeros(3), adapter=torch.tensor([0, 1, 0]))
    >>> router(torch.tensor([[0.3, 0.4, 0.3]]).log())
    tensor([0])

    :param weight: ``(n_clusters, dim)``; a cluster is a class as seen in one task.
    :param bias: ``(n_clusters,)``.
    :param adapter: index in the bank of each cluster's adapter, ``(n_clusters,)``.
    """

    weight: Tensor
    bias: Tensor
    adapter: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Returns the most probable adapter of each sample.

        The probability of an adapter is the sum of its clusters' probabilities.

        :param features: frozen features, ``(batch, dim)``.
        :return: indices in the bank, ``(batch,)``.
        """
        probability = (features @ self.weight.T + self.bias).softmax(1)  # (batch, n_clusters)
        n_adapters = int(self.adapter.max()) + 1
        of_adapter = probability.new_zeros(len(features), n_adapters)
        return of_adapter.index_add_(1, self.adapter, probability).argmax(1)


class RoutedView(TrainableView):
    """View of a model that, in evaluation mode, routes each sample to its adapter.

    A prediction does not depend on the rest of its batch. In training mode, or without a router,
    the output is that of the active adapter::

        view.eval()
        view(x)  # each sample uses the adapter that view.router selects
        view.forward_active(x)  # all samples use the active adapter
    """

    router: Router | None = None
    """Set after every task by the :class:`~treelora_avalanche.plugins.RouterPlugin`."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        if self.training or self.router is None or not len(images):
            return self.forward_active(images)
        return self.routed(images, self.router)

    def routed(self, images: Tensor, router: Router) -> Tensor:
        """Returns logits; each sample uses the adapter that the router selects.

        :param images: a batch of preprocessed images, at least one.
        :param router: the router.
        """
        raise NotImplementedError

    def frozen_features(self, images: Tensor) -> Tensor:
        """Returns the features of the backbone without any adapter, ``(batch, dim)``.

        :param images: a batch of preprocessed images.
        """
        raise NotImplementedError


def forward_by_adapter(
    factors: LoRAFactors, bank: AdapterBank, chosen: Tensor, forward: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns the outputs for samples, computed together for all samples of an adapter.

    :param factors: the active factors, which are overwritten; see :meth:`LoRAFactors.restored`.
    :param bank: the adapters.
    :param chosen: index in the bank of each sample's adapter, -1 for none, ``(batch,)``.
    :param forward: from the indices of some samples to their outputs under the active adapter.
    :return: the outputs in the order of the samples, ``(batch, ...)``.
    """
    rows, outputs = [], []
    for adapter in chosen.unique().tolist():
        rows.append((chosen == adapter).nonzero().squeeze(1))
        if adapter < 0:
            factors.zero_()
        else:
            factors.stack.copy_(bank[adapter])
        outputs.append(forward(rows[-1]))
    return torch.cat(outputs)[torch.cat(rows).argsort()]
