"""SD-LoRA (Wu et al., ICLR 2025, arXiv 2501.13198): trains magnitudes of frozen directions."""

from __future__ import annotations

from typing import Any

from treelora_avalanche.adapters import PastDirections
from treelora_avalanche.plugins.baselines.past_adapters import PastAdaptersPlugin
from treelora_avalanche.state import set_parameters


class SDLoRAPlugin(PastAdaptersPlugin):
    """Trains a new adapter in every experience, and the magnitudes of all past ones with it.

    The directions of the past do not change. The magnitudes' optimizer state starts anew with every
    experience. No sample of the past is used. Works with any strategy whose model carries LoRA and
    whose optimizer has one group. Task labels are not used. Example::

        past = PastDirections(model)
        strategy = Naive(model, plugins=[SDLoRAPlugin(past)])

    :param past: the past directions of the strategy's model.
    """

    past: PastDirections

    def __init__(self, past: PastDirections):
        super().__init__(past)

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Ends an interrupted experience."""
        self.end_interrupted(strategy)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Folds the adapter of the last experience, and adds the magnitudes to the optimizer."""
        super().before_training_exp(strategy, *args, **kwargs)
        self.past.train_magnitudes()
        set_parameters(strategy.optimizer, strategy.model.parameters())

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Fixes the magnitudes."""
        super().after_training_exp(strategy, *args, **kwargs)
        self.end_interrupted(strategy)

    def end_interrupted(self, strategy: Any) -> None:
        """Fixes magnitudes that are trainable, as they are.

        :param strategy: the strategy.
        """
        if any(magnitudes.requires_grad for magnitudes in self.past.magnitudes):
            self.past.fix_magnitudes()
            set_parameters(strategy.optimizer, strategy.model.parameters())
