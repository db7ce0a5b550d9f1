"""Vision transformer that selects one of the finished adapters for each sample."""

from __future__ import annotations

from torch import Tensor, nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.models.views.router import RoutedView, Router, forward_by_adapter
from treelora_avalanche.models.views.split_vit import SplitViT, is_transformer


class RoutedAdapters(SplitViT, RoutedView):
    """Routes each sample to one of the LoRA adapters of a bank.

    The blocks below the lowest adapted one run once, for the choice and for the output. The frozen
    rest gives the features that the router reads, and the samples of each adapter pass the rest
    once more, with that adapter on::

        view = RoutedAdapters(add_lora(vit), bank)
        view.router = router
        logits = view.eval()(images)

    :param module: a peft model around a timm vision transformer.
    :param bank: the bank of finished adapters.
    :raises ValueError: if there is no timm vision transformer in the model.
    """

    def __init__(self, module: nn.Module, bank: AdapterBank):
        if not is_transformer(module):
            raise ValueError(
                "`inference` is 'routed', which takes a timm VisionTransformer or Eva with timm's "
                "own forward pass; use inference='last'."
            )
        super().__init__(module)
        self.bank = bank

    def routed(self, images: Tensor, router: Router) -> Tensor:
        factors = LoRAFactors(self.module)
        start = self.start(images)
        with factors.restored():
            factors.zero_()
            chosen = router(self.features(start))
            return forward_by_adapter(
                factors,
                self.bank,
                chosen,
                lambda rows: self.forward_active(start._replace(hidden=start.hidden[rows])),
            )

    def frozen_features(self, images: Tensor) -> Tensor:
        factors = LoRAFactors(self.module)
        with factors.restored():
            factors.zero_()
            return self.features(images)
