"""TaSL (Feng et al. 2024, arXiv 2408.05200)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.plugins.baselines.tasl import TaSLPlugin
from treelora_avalanche.strategies.base.arguments import UnmergedLoRAOptions, check_language_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class TaSL(SeqLoRA):
    """Task skill localization and consolidation: each LoRA matrix is averaged by its importance.

    After a task, each factor A or B is consolidated with its value before the task, depending on
    its importance for the task and for the past (Eq. 9), see
    :class:`~treelora_avalanche.plugins.TaSLPlugin`. Stores one number per factor, independent of
    the number of tasks. Task labels are not used.

    Example::

        strategy = TaSL(create_language_model("meta-llama/Llama-2-7b-hf"), lr=1e-4)

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, with LoRA or without.
    :param important: share of the factors that are important to a task.
    :param past_weight: weight of the past in factors that are important to both.
    :param past_importance: weight of the past in the accumulated importance.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range, or the model is of another kind; the model
        is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        important: float = 0.2,
        past_weight: float = 0.7,
        past_importance: float = 0.7,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[UnmergedLoRAOptions],
    ):
        check_language_model(model, "TaSL")
        tasl = TaSLPlugin(important, past_weight, past_importance)
        super().__init__(model=model, plugins=[*(plugins or ()), tasl], **kwargs)
