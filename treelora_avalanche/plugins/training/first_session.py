"""Adapts all blocks to the first experience, and the last ones alone to those that follow."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.adapters import lora_layers
from treelora_avalanche.models.views.router import RoutedView
from treelora_avalanche.models.views.split import SplitView
from treelora_avalanche.plugins.baselines.ogd import OGDPlugin
from treelora_avalanche.plugins.baselines.tasl import TaSLPlugin
from treelora_avalanche.plugins.task_start import TaskStartPlugin
from treelora_avalanche.state import check_keys, check_same_settings, forget


class FirstSessionPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Settles the lower blocks after the first experience: they keep the adapter that it has given.

    What the data have in common, as their look and their resolution, is learned from the first
    experience by all adapted blocks, as in first-session adaptation (Panos et al., ICCV 2023). From
    the second on the lower blocks are as good as frozen: no gradient reaches them, and the
    :class:`~treelora_avalanche.plugins.PrefixCachePlugin` computes them once for every sample. So
    the stream costs little more than with the last blocks alone adapted, and these start from a
    model that knows the data (docs/performance.md).

    For strategies of this library with one LoRA adapter that goes on from experience to experience,
    with a timm vision transformer or a language model, and with more blocks adapted than
    ``n_blocks``, as with ``layers="all"``. Not where every experience has its own adapter, or where
    experiences are told apart by the model without it. Task labels are not used.

    :param n_blocks: blocks that go on being trained, counted from the output.
    :raises ValueError: if ``n_blocks`` is below 1.
    """

    def __init__(self, n_blocks: int = 6):
        super().__init__()
        if n_blocks < 1:
            raise ValueError(f"`n_blocks` must be at least 1, and is {n_blocks}.")
        self.n_blocks = n_blocks
        self.settled = False
        """Whether the first experience is over."""

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Looks at the model before anything is done to it.

        :raises ValueError: if it is not known in two parts, or lower blocks are not to settle.
        """
        if not self.settled:
            self._check(strategy)
        self._parameters = [
            parameter
            for block in strategy.model.blocks[: -self.n_blocks]
            for parameter in block.parameters()
            if parameter.requires_grad
        ]

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps the gradients of penalties, and so the optimizer, from the settled blocks."""
        if self.settled:
            for parameter in self._parameters:
                parameter.grad = None

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Settles the lower blocks."""
        if not self.settled:
            self.settled = True
            self.prepare_loaded(strategy)
            forget(strategy.optimizer, self._parameters)

    def prepare_loaded(self, strategy: Any) -> None:
        """Tells the model which blocks are settled.

        :param strategy: the strategy.
        """
        view = strategy.model
        view.n_settled = max(0, len(view.blocks) - self.n_blocks) if self.settled else 0
        view.train(view.training)  # it finds its prefix again

    def state_dict(self) -> dict[str, Any]:
        """Whether the first experience is over, and the number of blocks that go on."""
        return {"n_blocks": self.n_blocks, "settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where another plugin of this class has ended.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if another number of blocks goes on.
        """
        check_keys(state, {"n_blocks", "settled"}, "the state of FirstSessionPlugin")
        check_same_settings(state, {"n_blocks": self.n_blocks})
        self.settled = state["settled"]

    def _check(self, strategy: Any) -> None:
        model = strategy.model
        if not isinstance(model, SplitView):
            raise ValueError(
                f"`model` ({type(model).__name__}) is not known in two parts, so its lower blocks "
                "cannot settle; use one of this library's strategies with LoRA, with a timm vision "
                "transformer or a language model, or leave FirstSessionPlugin out."
            )
        if reason := _unsuited(strategy):
            raise ValueError(
                "FirstSessionPlugin is for one adapter that goes on from experience to experience, "
                f"and this {type(strategy).__name__} {reason}. Leave FirstSessionPlugin out."
            )
        if model.n_frozen is None:
            raise ValueError(
                "what lies below the blocks is trained, so these cannot settle; freeze it, or "
                "leave FirstSessionPlugin out."
            )
        if model.n_frozen >= len(model.blocks) - self.n_blocks:
            raise ValueError(
                f"`n_blocks` is {self.n_blocks}, and no block below the last {self.n_blocks} of "
                f"{len(model.blocks)} is adapted; adapt more of them, as with layers='all'."
            )


def _unsuited(strategy: Any) -> str | None:
    """Why the adapter of a strategy cannot settle in part; None where it can."""
    kinds = {type(plugin) for plugin in strategy.plugins}
    if any(hasattr(layer, "past_A") for layer in lora_layers(strategy.model).values()):
        return "has one for each"
    if isinstance(strategy.model, RoutedView) or TaskStartPlugin in kinds:
        return "tells experiences apart by the model without it"
    if OGDPlugin in kinds:
        return "moves all of it, to stay orthogonal to past gradients"
    if TaSLPlugin in kinds:
        return "consolidates all of it after every experience"
    return None
