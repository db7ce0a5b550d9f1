"""A model that chooses, for every sample, one of the finished adapters."""

from __future__ import annotations

from torch import Tensor, nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.models.views.router import RoutedView, Router, answer_by_adapter, restored
from treelora_avalanche.models.views.split_vit import PrefixView, find_transformer


class RoutedAdapters(PrefixView, RoutedView):
    """Routes each sample to one of the LoRA adapters of a bank.

    One pass through the frozen blocks below the lowest adapted one serves both the choice and the
    answer. Then the frozen rest tells the adapter, and the samples of each adapter go through the
    rest once more, with that adapter on.

    :param module: a peft model around a timm vision transformer.
    :param bank: the bank of finished adapters.
    :raises ValueError: if there is no timm vision transformer in the model.
    """

    def __init__(self, module: nn.Module, bank: AdapterBank):
        if find_transformer(module) is None:
            raise ValueError(
                "`inference` is 'routed', which takes a timm VisionTransformer with timm's own "
                "forward pass; use inference='last'."
            )
        super().__init__(module)
        self.bank = bank

    def routed(self, images: Tensor, router: Router) -> Tensor:
        factors = LoRAFactors(self.module)
        hidden = self.hidden(images)
        with restored(factors):
            factors.stack.zero_()  # LoRA's output is BA x: without factors the model is frozen
            chosen = router(self.features(hidden))
            return answer_by_adapter(
                factors, self.bank, chosen, lambda rows: self.live(hidden[rows])
            )

    def frozen_features(self, images: Tensor) -> Tensor:
        factors = LoRAFactors(self.module)
        with restored(factors):
            factors.stack.zero_()
            return self.features(images)
