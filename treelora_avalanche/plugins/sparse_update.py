"""The sparse update of TreeLoRA (Eq. 3): stay, in most coordinates exactly, at a past adapter."""

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
    """Proximal step of ``threshold * ||factors - anchor||_1``: soft thresholding around the anchor.

    theta <- theta_k + sign(theta - theta_k) max(|theta - theta_k| - threshold, 0). A coordinate
    within the threshold lands on the anchor exactly, which a subgradient step never does.

    :param factors: theta, ``(n_layers, dim)``.
    :param anchor: theta_k, of the same shape.
    :param threshold: learning rate times lambda, at least 0.
    :return: the new factors, of the same shape.
    """
    return proximal_step_(factors.clone(), anchor, threshold)


def proximal_step_(factors: Tensor, anchor: Tensor, threshold: float) -> Tensor:
    """:func:`proximal_step` in place, in three passes over two tensors.

    Fresh memory of the adapter's size, asked for at every step, would cost a CPU more than the
    arithmetic, so the shrinkage, which :mod:`torch.nn.functional` has not in place, is called by
    its name among PyTorch's operators.

    :return: ``factors``.
    """
    difference = factors.sub_(anchor)
    torch.ops.aten.softshrink.out(difference, threshold, out=difference)
    return difference.add_(anchor)


class SparseUpdatePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Pulls the adapter, in L1, towards the past adapter that the selector has picked.

    The penalty ``tree_lambda * sum_l ||theta^l - theta_{k_l}^l||_1`` is applied as its proximal
    step after the optimizer's, at its current learning rate, from the second experience on. After
    every epoch its value, and the share of coordinates that equal the picked adapter's, are
    published to the strategy's evaluator as ``SparsePenalty`` and ``SharedCoordinates``. Works with
    any strategy whose model carries LoRA. Task labels are not used.

    :param selector: the plugin that picks; it must come before this one among the plugins.
    :param bank: the bank of finished adapters, filled by a
        :class:`~treelora_avalanche.plugins.tree_builder.TreeBuilderPlugin`.
    :param tree_lambda: strength lambda of the penalty; 0 leaves the training untouched.
    :raises ValueError: if ``tree_lambda`` is negative.
    """

    def __init__(self, selector: SelectorPlugin, bank: AdapterBank, tree_lambda: float = 0.5):
        super().__init__()
        if not tree_lambda >= 0:
            raise ValueError(f"`tree_lambda` must be at least 0, and is {tree_lambda}.")
        self.selector = selector
        self.bank = bank
        self.tree_lambda = tree_lambda
        self._anchor: Tensor | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Finds the live adapter and the part of the optimizer that moves it."""
        self._factors = LoRAFactors(strategy.model)
        self._anchor = None
        a, _ = self._factors.parameters[0]
        self._group = next(
            group
            for group in strategy.optimizer.param_groups
            if any(parameter is a for parameter in group["params"])
        )

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Asks for the picked adapter, which arrives during the step."""
        if self.tree_lambda > 0 and self.selector.picks is not None:
            self.bank.request(self.selector.picks)

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Takes the proximal step."""
        if self.tree_lambda > 0 and self.selector.picks is not None:
            self._anchor = self.bank.receive()
            threshold = float(self._group["lr"]) * self.tree_lambda
            proximal_step_(self._factors.stack, self._anchor, threshold)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Publishes the penalty and the sparsity that it has reached."""
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
        """The strength, so that a stream is not continued with another by mistake."""
        return {"tree_lambda": float(self.tree_lambda)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the strength is the same; there is nothing to load.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the strength differs.
        """
        check_keys(state, {"tree_lambda"}, "the state of SparseUpdatePlugin")
        check_same_settings(state, {"tree_lambda": self.tree_lambda})
