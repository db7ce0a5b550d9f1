"""HiDe with LoRA (Wang et al. 2024, HiDe-PET, arXiv 2407.05229) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from treelora_avalanche.adapters import AdapterBank, TrainableView
from treelora_avalanche.models.prompted_vit import check_vision_transformer
from treelora_avalanche.models.routed import RoutedAdapters
from treelora_avalanche.plugins.hide import TaskAdaptersPlugin, hide_plugins
from treelora_avalanche.strategies.positional_model import positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


@positional_model
class HiDeLoRA(SeqLoRA):
    """One LoRA adapter per task, chosen at test time by the class that the frozen backbone sees.

    The steps of :class:`HiDePrompt`, with an adapter in the place of the prompt, which starts from
    that of the task before; there is no ensemble (the released code averages past factors into new
    ones after training, but a mean of A's and a mean of B's make no mean of adapters). LoRA adapts
    keys and values: timm fuses them with the queries, whose part of the factors is held at zero
    (:class:`~treelora_avalanche.plugins.TaskAdaptersPlugin`); keys and values share the factor A.

    Stores per task one adapter, ``rank * 4 * width`` values per layer, on the host, and per class
    twice (frozen, and under the adapter) ``n_centroids * (2 * width + 1)`` values.

    :param model: a pretrained VisionTransformer of timm, plain or with LoRA, see :class:`SeqLoRA`.
    :param contrast: weight of the push from past classes.
    :param n_centroids: centroids per class, by k-means.
    :param seed: of the pseudo-features.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`, without ``target_modules`` and ``head``, which
        are the method's own.
    :raises ValueError: if an argument is out of range, or the model of another kind; it is then as
        it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        contrast: float = 0.1,
        n_centroids: int = 10,
        seed: int = 0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        head, contrastive, router = hide_plugins(contrast, n_centroids, seed)
        if isinstance(model, TrainableView):
            model = model.module  # the view must be one that routes
        vit = next((m for m in model.modules() if isinstance(m, VisionTransformer)), model)
        check_vision_transformer(vit, "HiDeLoRA")
        self.bank = AdapterBank()
        own = [head, TaskAdaptersPlugin(self.bank), contrastive, router]
        super().__init__(model=model, plugins=[*(plugins or ()), *own], **kwargs)

    def _view(self, model: nn.Module) -> TrainableView:
        return RoutedAdapters(model, self.bank)
