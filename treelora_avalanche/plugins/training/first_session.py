"""Adapts all blocks to the first experience, and only the last ones to later experiences."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.models.views.split import SplitView
from treelora_avalanche.state import check_keys, check_same_settings, reset_optimizer_state


class FirstSessionPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Freezes the adapters of the lower blocks after the first experience.

    Properties common to the data, such as style and resolution, are learned from the first
    experience by all adapted blocks, as in first-session adaptation (Panos et al., ICCV 2023). From
    the second on no gradient reaches the lower blocks, and
    :class:`~treelora_avalanche.plugins.ActivationCachePlugin` computes them once per sample. The
    stream then costs little more than with only the last blocks adapted, and these start from a
    model adapted to the data (docs/performance.md).

    For strategies of this library with one LoRA adapter that is trained on from experience to
    experience, with a timm vision transformer or a language model, and with more blocks adapted
    than ``n_blocks``, as with ``layers="all"``. A plugin that needs the whole adapter says why in
    an attribute ``requires_whole_adapter``, such as ``"rotates the whole adapter"``, and is
    refused. Task labels are not used. Example::

        strategy = TreeLoRAStrategy(vit, layers="all", plugins=[FirstSessionPlugin(n_blocks=6)])

    :param n_blocks: blocks that remain trainable, counted from the output.
    :raises ValueError: if ``n_blocks`` is below 1.
    """

    def __init__(self, n_blocks: int = 6):
        super().__init__()
        if n_blocks < 1:
            raise ValueError(
                f"`n_blocks` should be at least 1, but is {n_blocks}. Pass the number of blocks to "
                "train on."
            )
        self.n_blocks = n_blocks
        self.settled = False
        """Whether the first experience is over."""

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Checks the model and the other plugins before anything is trained.

        :raises ValueError: if the model cannot be split at a block, or its lower blocks cannot be
            frozen.
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
        """Clears the gradients of penalties on the frozen blocks."""
        if self.settled:
            for parameter in self._parameters:
                parameter.grad = None

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Freezes the lower blocks after the first experience."""
        if not self.settled:
            self.settled = True
            self.prepare_loaded(strategy)
            reset_optimizer_state(strategy.optimizer, self._parameters)

    def prepare_loaded(self, strategy: Any) -> None:
        """Sets the number of frozen blocks of the model.

        :param strategy: the strategy.
        """
        view = strategy.model
        view.n_settled = max(0, len(view.blocks) - self.n_blocks) if self.settled else 0
        view.train(view.training)  # recomputes the number of frozen blocks

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the first experience is over, and the number of trainable blocks."""
        return {"n_blocks": self.n_blocks, "settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the number of trainable blocks differs.
        """
        check_keys(state, {"n_blocks", "settled"}, "the state of FirstSessionPlugin")
        check_same_settings(state, {"n_blocks": self.n_blocks})
        self.settled = state["settled"]

    def _check(self, strategy: Any) -> None:
        model = strategy.model
        if not isinstance(model, SplitView):
            raise ValueError(
                "`model` should be a timm vision transformer or a language model in one of this "
                f"library's strategies with LoRA, but is a {type(model).__name__}, which cannot be "
                "split at a block. Leave FirstSessionPlugin out."
            )
        for plugin in strategy.plugins:
            if reason := getattr(plugin, "requires_whole_adapter", None):
                raise ValueError(
                    "FirstSessionPlugin freezes part of the adapter after the first experience, "
                    f"and {type(plugin).__name__} {reason}. Leave one of the two out."
                )
        if model.n_frozen is None:
            raise ValueError(
                "layers below the blocks should be frozen, but are trained. Freeze them, or leave "
                "FirstSessionPlugin out."
            )
        if model.n_frozen >= len(model.blocks) - self.n_blocks:
            raise ValueError(
                f"`n_blocks` should be below the number of adapted blocks, but is {self.n_blocks}, "
                f"and no block below the last {self.n_blocks} of {len(model.blocks)} is adapted. "
                "Adapt more blocks, as with layers='all'."
            )
