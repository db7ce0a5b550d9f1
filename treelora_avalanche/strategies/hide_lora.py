"""HiDe with LoRA (Wang et al. 2024, HiDe-PET, arXiv 2407.05229) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from treelora_avalanche.adapters import AdapterBank, TrainableView
from treelora_avalanche.models.features.centroids import Centroids
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.prompts.language_input import check_query_length
from treelora_avalanche.models.prompts.vit import check_vision_transformer
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel
from treelora_avalanche.models.views.routed_vit import RoutedAdapters
from treelora_avalanche.plugins import RouterPlugin
from treelora_avalanche.plugins.baselines.hide import TaskAdaptersPlugin, hide_plugins
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA

LANGUAGE_TARGETS = ("k_proj", "v_proj")
"""Keys and values of Llama, Mistral, Gemma, Qwen and others that keep them apart."""


@positional_model
class HiDeLoRA(SeqLoRA):
    """One LoRA adapter per task, chosen at test time by the class that the frozen backbone sees.

    The steps of :class:`HiDePrompt`, with an adapter in the place of the prompt, which starts from
    that of the task before; there is no ensemble (the released code averages past factors into new
    ones after training, but a mean of A's and a mean of B's make no mean of adapters). LoRA adapts
    keys and values: timm fuses them with the queries, whose part of the factors is held at zero
    (:class:`~treelora_avalanche.plugins.TaskAdaptersPlugin`); keys and values share the factor A.

    On language models, whose classes are tokens, there is no head to align and no push from past
    classes. What remains is the inference of the task: all texts of a task are one class to the
    router, which reads the beginning of a text through the frozen network
    (:class:`~treelora_avalanche.models.views.routed_language.RoutedLanguageModel`). Then the
    adapter of that task gives the logits, or generates the whole answer.

    Stores per task one adapter, ``rank * 4 * width`` values per layer, on the host, and per class
    twice (frozen, and under the adapter) ``n_centroids * (2 * width + 1)`` values; on language
    models one adapter, ``rank * (n_in + n_out)`` values per matrix, and ``n_centroids * (2 * width
    + 1)`` values per task.

    :param model: a pretrained VisionTransformer of timm, plain or with LoRA, see :class:`SeqLoRA`;
        or a :class:`~treelora_avalanche.models.LanguageModel`.
    :param contrast: weight of the push from past classes; without a say on language models.
    :param n_centroids: centroids per class, by k-means.
    :param query_length: tokens at the beginning of a text by which its task is inferred. Chat
        templates begin all prompts alike, by some tens of tokens; it must reach beyond.
    :param seed: of the pseudo-features.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`, without ``head``, which is the method's own,
        and, for images, without ``target_modules``; for language models these are ``("k_proj",
        "v_proj")`` by default.
    :raises ValueError: if an argument is out of range, or the model of another kind; it is then as
        it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        contrast: float = 0.1,
        n_centroids: int = 10,
        query_length: int = 64,
        seed: int = 0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        head, contrastive, router = hide_plugins(contrast, n_centroids, seed)
        if isinstance(model, TrainableView):
            model = model.module  # the view must be one that routes
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
            return RoutedLanguageModel(model, self.bank, self.query_length)
        return RoutedAdapters(model, self.bank)
