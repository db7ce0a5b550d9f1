"""DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.prompts.language_attention import add_dual_prompts
from treelora_avalanche.models.prompts.vit import DualPromptedViT, check_vision_transformer
from treelora_avalanche.plugins import KeyLossPlugin, TaskPromptsPlugin, WithinTaskLossPlugin
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)


@positional_model
class DualPrompt(ParameterEfficientStrategy):
    """General prompts that all tasks share in low blocks, an expert prompt of each task above them.

    Prompts are prefixes of the keys and values of the attention. A task trains the general prompts,
    its own expert prompt, which starts from that of the task before, and its own key, which is
    pulled to the queries: the features of the frozen backbone (a second pass, in training too). At
    test time every sample takes the expert prompt of the key nearest to its query by cosine; a
    batch may mix tasks. While a task is trained, the loss compares its classes alone.

    The query of a text is the mean of the frozen embeddings of its first ``query_length`` tokens,
    as in :class:`L2P`, without a second pass. There the prefixes stand before the text in the
    attention of their layers, in training and in generation, and take no positions.

    Stores per task ``n_expert_layers * 2 * expert_length + 1`` vectors of the model's width; of a
    language model with fewer heads for keys and values than for queries, the vectors are as wide as
    those keys. The store grows with the tasks: there is no pool of a fixed size to run out of.

    :param model: a pretrained VisionTransformer of timm, which is frozen, but for its classifier;
        or a :class:`~treelora_avalanche.models.LanguageModel`, which is frozen, and must do without
        gradient checkpointing.
    :param general_length: length of the general prompts.
    :param general_layers: block numbers, counted from 0, of the general prompts.
    :param expert_length: length of the expert prompts.
    :param expert_layers: block numbers of the expert prompts.
    :param query_length: tokens that the query of a text is taken from, see :class:`L2P`.
    :param sim_coefficient: weight of the key's distance in the loss; the released code's is 1.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`ParameterEfficientStrategy`.
    :raises ValueError: if an argument is out of range, or the model of another kind; it is then as
        it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        general_length: int = 5,
        general_layers: Sequence[int] = (0, 1),
        expert_length: int = 20,
        expert_layers: Sequence[int] = (2, 3, 4),
        query_length: int = 64,
        sim_coefficient: float = 1.0,
        head: str = "linear",
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        check_training(model, head=head, plugins=plugins, **kwargs)
        key_loss = KeyLossPlugin(sim_coefficient)
        prompts: dict[str, Any] = {
            "general_layers": tuple(general_layers),
            "general_length": general_length,
            "expert_layers": tuple(expert_layers),
            "expert_length": expert_length,
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
        super().__init__(
            model=TrainableView(model), head=head, plugins=[*(plugins or ()), *own], **kwargs
        )
