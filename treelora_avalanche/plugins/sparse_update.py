"""Sparse update of TreeLoRA (Eq. 3): proximal steps towards a past adapter."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.plugins.lcb_selector import SelectorPlugin
from treelora_avalanche.state import check_keys, check_same_settings


def proximal_step(factors: Tensor, anchor: Tensor, threshold: float) -> Tensor:
    """Returns the proximal step of ``threshold * ‖θ − θ_k‖_1``: soft thresholding around the
    anchor.

    ``θ <- θ_k + sign(θ − θ_k) max(|θ − θ_k| − threshold, 0)``. A coordinate within the threshold
    lands exactly on the anchor, which a subgradient step never does.

    >>> proximal_step(torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), threshold=0.5)
    tensor([[0.5000, 0.0000]])

    :param factors: θ, ``(n_layers, dim)``.
    :param anchor: θ_k, of the same shape.
    :param threshold: learning rate times λ, at least 0.
    :return: the new factors, of the same shape.
    """
    return proximal_step_(factors.clone(), anchor, threshold)


def proximal_step_(factors: Tensor, anchor: Tensor, threshold: float) -> Tensor:
    """Applies :func:`proximal_step` in place, in three passes over two tensors.

    On a CPU, allocating memory of the adapter's size at every step would cost more than the
    arithmetic. :mod:`torch.nn.functional` has no in-place shrinkage, so PyTorch's operator is
    called directly.

    :return: ``factors``.
    """
    difference = factors.sub_(anchor)
    torch.ops.aten.softshrink.out(difference, threshold, out=difference)
    return difference.add_(anchor)


class SparseUpdatePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Regularises the adapter towards the past adapter that the selector has picked, in L1.

    The penalty ``λ Σ_l ‖θ^l − θ_{k_l}^l‖_1`` is applied as its proximal step after the optimizer's,
    at the current learning rate, from the second experience on. After every epoch its value, and
    the share of coordinates equal to the picked adapter's, are published to the strategy's
    evaluator as ``SparsePenalty`` and ``SharedCoordinates``. Works with any strategy whose model
    carries LoRA. Task labels are not used. Example::

        selector = LCBSelectorPlugin(tree)
        plugins = [TreeBuilderPlugin(tree, bank), selector, SparseUpdatePlugin(selector, bank, 0.5)]

    :param selector: the plugin that picks; it must come before this one among the plugins.
    :param bank: the bank of finished adapters, filled by a
        :class:`~treelora_avalanche.plugins.tree_builder.TreeBuilderPlugin`.
    :param tree_lambda: strength λ of the penalty; 0 leaves training unchanged.
    :raises ValueError: if ``tree_lambda`` is negative.
    """

    def __init__(self, selector: SelectorPlugin, bank: AdapterBank, tree_lambda: float = 0.5):
        super().__init__()
        if not tree_lambda >= 0:
            raise ValueError(
                f"`tree_lambda` should be at least 0, but is {tree_lambda}. Use 0 for no penalty."
            )
        self.selector = selector
        self.bank = bank
        self.tree_lambda = tree_lambda
        self._anchor: Tensor | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Finds the active adapter and its parameter group."""
        self._factors = LoRAFactors(strategy.model)
        self._anchor = None
        a, _ = self._factors.parameters[0]
        self._group = next(
            group
            for group in strategy.optimizer.param_groups
            if any(parameter is a for parameter in group["params"])
        )

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Requests the picked adapter, which arrives during the step."""
        if self.tree_lambda > 0 and self.selector.picks is not None:
            self.bank.request(self.selector.picks)

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Applies the proximal step."""
        if self.tree_lambda > 0 and self.selector.picks is not None:
            self._anchor = self.bank.receive()
            threshold = float(self._group["lr"]) * self.tree_lambda
            proximal_step_(self._factors.stack, self._anchor, threshold)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Publishes the penalty and the share of unchanged coordinates."""
        if self._anchor is None:
            return
        difference = self._factors.stack - self._anchor
        n_values = sum(shape.size for shape in self._factors.shapes)
        shared = 1 - difference.count_nonzero().item() / n_values
        penalty = self.tree_lambda * difference.abs().sum().item()
        for name, value in (("SparsePenalty", penalty), ("SharedCoordinates", shared)):
            strategy.evaluator.publish_metric_value(
                MetricValue(
                    self,
                    f"{name}/train_phase/train_stream",
                    value,
                    strategy.clock.train_iterations,
                )
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the strength, so that a stream is not continued with another."""
        return {"tree_lambda": float(self.tree_lambda)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the strength is the same; nothing is loaded.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the strength differs.
        """
        check_keys(state, {"tree_lambda"}, "the state of SparseUpdatePlugin")
        check_same_settings(state, {"tree_lambda": self.tree_lambda})
