"""HiDe-Prompt (Wang et al., NeurIPS 2023, arXiv 2310.07234)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.models.prompts.vit import (
    RoutedPrompts,
    TaskPromptedViT,
    check_vision_transformer,
)
from treelora_avalanche.plugins import TaskPromptsPlugin
from treelora_avalanche.plugins.baselines.hide import hide_plugins
from treelora_avalanche.strategies.base.arguments import OwnHeadOptions
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)


class HiDePrompt(ParameterEfficientStrategy):
    """One prompt per task, selected at test time by a classifier on the frozen backbone.

    The paper's steps:

    1. Task-identity inference: a classifier of all classes on frozen features predicts the task of
       a sample (:class:`~treelora_avalanche.plugins.RouterPlugin`).
    2. Within-task prediction: a task trains its prompt, prefixes of keys and values, in an ensemble
       with past ones, with a loss over its own classes and a contrastive term against past ones
       (:class:`~treelora_avalanche.plugins.ContrastivePlugin`).
    3. Classes are represented by centroids of their features under the task's own prompt.
    4. Task-adaptive prediction: the head is re-trained on pseudo-features
       (:class:`~treelora_avalanche.plugins.TrainedHeadPlugin`).
    5. At test time a frozen pass infers the task, and a second pass with its prompt predicts.

    Step 1 uses statistics only; the paper also trains it by gradients on each task's images. The
    ensemble takes the mean of past prompts, as in the released code (the paper writes their sum).

    Stores per task one prompt of ``n_layers * 2 * prompt_length`` vectors of the model's width, and
    per class twice (frozen, and under the prompt) ``n_centroids * (2 * width + 1)`` values. Task
    labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        strategy = HiDePrompt(model, prompt_length=20, lr=0.005)

    :param model: a pretrained VisionTransformer of timm, frozen except for its classifier.
    :param prompt_length: length of the prompts (20 or 5 in the released scripts).
    :param prompt_layers: block numbers, counted from 0, of the prompts.
    :param momentum: weight of the past prompts in the ensemble; the paper's is 0.1.
    :param contrast: weight of the contrastive term; the paper's is 0.1.
    :param temperature: temperature of the contrastive term; the paper's is 0.8.
    :param n_centroids: k-means centroids per class.
    :param seed: seed of the pseudo-features.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of
        :class:`~treelora_avalanche.strategies.base.parameter_efficient.ParameterEfficientStrategy`
        without ``head``, which is the method's own.
    :raises ValueError: if an argument is out of range, or the model is of another kind; the model
        is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prompt_length: int = 20,
        prompt_layers: Sequence[int] = (0, 1, 2, 3, 4),
        momentum: float = 0.1,
        contrast: float = 0.1,
        temperature: float = 0.8,
        n_centroids: int = 10,
        seed: int = 0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[OwnHeadOptions],
    ):
        check_training(model, plugins=plugins, **kwargs)
        head, contrastive, router = hide_plugins(contrast, n_centroids, seed, temperature)
        prompted = TaskPromptedViT(
            check_vision_transformer(model, "HiDePrompt"),
            layers=tuple(prompt_layers),
            length=prompt_length,
            momentum=momentum,
        )
        own = [head, TaskPromptsPlugin(prompted.prompts), contrastive, router]
        super().__init__(model=RoutedPrompts(prompted), plugins=[*(plugins or ()), *own], **kwargs)
