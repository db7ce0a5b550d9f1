"""TaSL (Feng et al. 2024, arXiv 2408.05200) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.plugins.baselines.tasl import TaSLPlugin
from treelora_avalanche.strategies.base.arguments import check_language_model, positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


@positional_model
class TaSL(SeqLoRA):
    """One adapter, each of whose matrices is consolidated after a task with what it was before.

    For the importance of the matrices, and the rule by which they are mixed, see
    :class:`~treelora_avalanche.plugins.TaSLPlugin`. Stores one number per matrix A or B, however
    many tasks.

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, with LoRA or without.
    :param important: share of the matrices that matters to a task.
    :param past_weight: share of the past in matrices that matter to both.
    :param past_importance: share of the past in the accumulated importance.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range, or the model of another kind; it is then as
        it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        important: float = 0.2,
        past_weight: float = 0.7,
        past_importance: float = 0.7,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        check_language_model(model, "TaSL")
        tasl = TaSLPlugin(important, past_weight, past_importance)
        super().__init__(model=model, plugins=[*(plugins or ()), tasl], **kwargs)
