"""DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.prompts.language_attention import add_dual_prompts
from treelora_avalanche.models.prompts.vit import DualPromptedViT, check_vision_transformer
from treelora_avalanche.plugins import KeyLossPlugin, TaskPromptsPlugin, WithinTaskLossPlugin
from treelora_avalanche.strategies.base.arguments import TrainingOptions
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)

IMAGE_LENGTHS, TEXT_LENGTHS = (5, 20), (2, 3)
"""Lengths of the general and the expert prompts: the paper's, and those of TRACE and of TreeLoRA's
release, which prepend them to the input embeddings."""


class DualPrompt(ParameterEfficientStrategy):
    """General prompts shared by all tasks in low blocks, one expert prompt per task above them.

    Prompts are prefixes to the keys and values of the attention. A task trains the general prompts,
    its own expert prompt, initialised from that of the previous task, and its own key, which the
    loss pulls to the queries: features of the frozen backbone (a second forward pass). At test time
    each sample uses the expert prompt with the highest cosine similarity between key and query; a
    batch may mix tasks. The loss compares the current task's classes only.

    The query of a text is the mean of the frozen embeddings of its first ``query_length`` tokens,
    as in :class:`L2P`, without a second pass. The prefixes precede the text in the attention of
    their layers, in training and in generation, and take no positions.

    Stores per task ``n_expert_layers * 2 * expert_length + 1`` vectors of the model's width; for a
    language model with fewer key-value heads than query heads, the vectors are as wide as its keys.
    Task labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        strategy = DualPrompt(model, expert_length=20, lr=0.005)

    :param model: a pretrained VisionTransformer of timm, frozen except for its classifier; or a
        frozen :class:`~treelora_avalanche.models.LanguageModel` without gradient checkpointing.
    :param general_length: length of the general prompts; default 5, the paper's, for language
        models 2, that of TRACE.
    :param general_layers: block numbers, counted from 0, of the general prompts.
    :param expert_length: length of the expert prompts; default 20, for language models 3.
    :param expert_layers: block numbers of the expert prompts.
    :param query_length: tokens of a text that its query is computed from, see :class:`L2P`.
    :param sim_coefficient: weight of the key loss; the released code's is 1.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of
        :class:`~treelora_avalanche.strategies.base.parameter_efficient.ParameterEfficientStrategy`.
    :raises ValueError: if an argument is out of range, or the model is of another kind; the model
        is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        general_length: int | None = None,
        general_layers: Sequence[int] = (0, 1),
        expert_length: int | None = None,
        expert_layers: Sequence[int] = (2, 3, 4),
        query_length: int = 64,
        sim_coefficient: float = 1.0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[TrainingOptions],
    ):
        check_training(model, plugins=plugins, **kwargs)
        key_loss = KeyLossPlugin(sim_coefficient)
        language = isinstance(model, LanguageModel)
        lengths = TEXT_LENGTHS if language else IMAGE_LENGTHS
        prompts: dict[str, Any] = {
            "general_layers": tuple(general_layers),
            "general_length": lengths[0] if general_length is None else general_length,
            "expert_layers": tuple(expert_layers),
            "expert_length": lengths[1] if expert_length is None else expert_length,
        }
        own: list[SupervisedPlugin] = []
        if isinstance(model, LanguageModel):
            experts = add_dual_prompts(model, **prompts, query_length=query_length)
        else:
            vit = check_vision_transformer(model, "DualPrompt", or_language=True)
            model = DualPromptedViT(vit, **prompts)
            experts = model.experts
            own.append(WithinTaskLossPlugin())
        own += [TaskPromptsPlugin(experts), key_loss]
        super().__init__(model=TrainableView(model), plugins=[*(plugins or ()), *own], **kwargs)
