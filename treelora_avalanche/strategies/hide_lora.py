"""HiDe with LoRA (Wang et al. 2024, HiDe-PET, arXiv 2407.05229)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import AdapterBank, TrainableView
from treelora_avalanche.models.features.centroids import Centroids
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.prompts.language_input import check_query_length
from treelora_avalanche.models.prompts.vit import check_vision_transformer
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel
from treelora_avalanche.models.views.routed_vit import RoutedAdapters
from treelora_avalanche.plugins import RouterPlugin
from treelora_avalanche.plugins.baselines.hide import TaskAdaptersPlugin, hide_plugins
from treelora_avalanche.strategies.base.arguments import OwnHeadLoRAOptions
from treelora_avalanche.strategies.seq_lora import SeqLoRA

LANGUAGE_TARGETS = ("k_proj", "v_proj")
"""Keys and values of Llama, Mistral, Gemma, Qwen and other models that keep them separate."""


class HiDeLoRA(SeqLoRA):
    """One LoRA adapter per task, selected at test time by a classifier on the frozen backbone.

    The steps of :class:`HiDePrompt` with an adapter instead of a prompt, initialised from that of
    the previous task. There is no ensemble: the released code averages past factors into new ones,
    but the product of a mean A and a mean B is not the mean of adapters. LoRA adapts keys and
    values: timm fuses them with the queries, whose part of the factors is held at zero
    (:class:`~treelora_avalanche.plugins.TaskAdaptersPlugin`); keys and values share the factor A.

    Language models predict tokens and have no classes: there is no head to align, and no
    contrastive term. A router over tasks reads the beginning of a text through the frozen network
    (:class:`~treelora_avalanche.models.views.routed_language.RoutedLanguageModel`); the adapter of
    the predicted task computes the logits, or generates the whole answer.

    Stores per task one adapter, ``rank * 4 * width`` values per layer, on the host, and per class
    twice (frozen, and under the adapter) ``n_centroids * (2 * width + 1)`` values; for language
    models one adapter, ``rank * (n_in + n_out)`` values per matrix, and ``n_centroids * (2 * width
    + 1)`` values per task. Task labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        strategy = HiDeLoRA(model, rank=10, lr=0.005)

    :param model: a pretrained VisionTransformer of timm, plain or with LoRA, see :class:`SeqLoRA`;
        or a :class:`~treelora_avalanche.models.LanguageModel`.
    :param contrast: weight of the contrastive term; ignored for language models.
    :param temperature: temperature of the contrastive term; the paper's is 0.8.
    :param n_centroids: k-means centroids per class.
    :param query_length: tokens at the beginning of a text that its task is inferred from. Chat
        templates begin all prompts alike, by some tens of tokens; it must reach beyond them.
    :param seed: seed of the pseudo-features.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA` without ``head``, which is the method's own.
        ``target_modules`` is ``("k_proj", "v_proj")`` by default for language models.
    :raises ValueError: if an argument is out of range, or the model is of another kind; the model
        is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        contrast: float = 0.1,
        temperature: float = 0.8,
        n_centroids: int = 10,
        query_length: int = 64,
        seed: int = 0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[OwnHeadLoRAOptions],
    ):
        head, contrastive, router = hide_plugins(contrast, n_centroids, seed, temperature)
        if isinstance(model, TrainableView):
            model = model.module  # its view is replaced by one that routes
        check_query_length(query_length)
        self.query_length = query_length
        self.bank = AdapterBank()
        adapters = TaskAdaptersPlugin(self.bank)
        own: list[SupervisedPlugin]
        if isinstance(model, LanguageModel):
            own = [adapters, RouterPlugin(seed=seed, kind=Centroids(n_centroids))]
            if kwargs.get("target_modules") is None:
                kwargs["target_modules"] = LANGUAGE_TARGETS
        else:
            vit = next((m for m in model.modules() if isinstance(m, VisionTransformer)), model)
            check_vision_transformer(vit, "HiDeLoRA", or_language=True)
            own = [head, adapters, contrastive, router]
        super().__init__(model=model, plugins=[*(plugins or ()), *own], **kwargs)

    def _view(self, model: nn.Module) -> TrainableView:
        if isinstance(model, LanguageModel):
            return RoutedLanguageModel(
                model, self.bank, layer="last", query_length=self.query_length
            )
        return RoutedAdapters(model, self.bank)
