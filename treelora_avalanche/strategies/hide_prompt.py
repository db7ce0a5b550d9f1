"""HiDe-Prompt (Wang et al., NeurIPS 2023, arXiv 2310.07234) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.models.prompts.vit import (
    RoutedPrompts,
    TaskPromptedViT,
    check_vision_transformer,
)
from treelora_avalanche.plugins import TaskPromptsPlugin
from treelora_avalanche.plugins.baselines.hide import hide_plugins
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)


@positional_model
class HiDePrompt(ParameterEfficientStrategy):
    """One prompt per task, chosen at test time by the class that the frozen backbone sees.

    The paper's steps: (1) a classifier of all classes on the frozen backbone tells the task of a
    sample, see :class:`~treelora_avalanche.plugins.RouterPlugin`; (2) a task trains its prompt,
    prefixes of keys and values, in an ensemble with past ones, its loss among its own classes and
    with a push from past ones, see :class:`~treelora_avalanche.plugins.ContrastivePlugin`; (3) the
    classes are remembered by centroids of their features under the task's own prompt; (4) the head
    is re-trained on pseudo-features, see
    :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin`; (5) at test time a frozen pass
    gives the task, and a second pass with that task's prompt the answer.

    The two passes are the method's cost at test time; in training there is one. The first is told
    on statistics alone: the paper also trains it by gradients on each task's images. The ensemble
    is with the mean of past prompts, as in the released code (the paper writes their sum).

    Stores per task one prompt of ``n_layers * 2 * prompt_length`` vectors of the model's width, and
    per class twice (frozen, and under the prompt) ``n_centroids * (2 * width + 1)`` values.

    :param model: a pretrained VisionTransformer of timm; it is frozen, but for its classifier.
    :param prompt_length: length of the prompts (the released scripts have 20 or 5).
    :param prompt_layers: block numbers, counted from 0, of the prompts.
    :param momentum: weight of the past prompts in the ensemble; the paper's is 0.1.
    :param contrast: weight of the push from past classes; the paper's is 0.1.
    :param n_centroids: centroids per class, by k-means.
    :param seed: of the pseudo-features.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`ParameterEfficientStrategy`, without ``head``, which is
        the method's own.
    :raises ValueError: if an argument is out of range, or the model of another kind; it is then as
        it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        prompt_length: int = 20,
        prompt_layers: Sequence[int] = (0, 1, 2, 3, 4),
        momentum: float = 0.1,
        contrast: float = 0.1,
        n_centroids: int = 10,
        seed: int = 0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        check_training(model, plugins=plugins, **kwargs)
        head, contrastive, router = hide_plugins(contrast, n_centroids, seed)
        prompted = TaskPromptedViT(
            check_vision_transformer(model, "HiDePrompt"),
            layers=tuple(prompt_layers),
            length=prompt_length,
            momentum=momentum,
        )
        own = [head, TaskPromptsPlugin(prompted.prompts), contrastive, router]
        super().__init__(model=RoutedPrompts(prompted), plugins=[*(plugins or ()), *own], **kwargs)
