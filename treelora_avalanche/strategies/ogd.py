"""Orthogonal gradient descent (Farajtabar et al., AISTATS 2020) on a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.plugins import OGDPlugin
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


@positional_model
class OGD(SeqLoRA):
    """:class:`SeqLoRA` whose gradients are projected off those of past samples.

    For the method see :class:`~treelora_avalanche.plugins.OGDPlugin`. Stores per task
    ``samples_per_task`` vectors of the size of what is trained, within the budget.

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param samples_per_task: samples of a task whose gradients are stored; the paper's is 200.
    :param memory_size: budget of vectors over all tasks, which share it equally once it is full.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range, or the budget is below one task; the model
        is then as it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        samples_per_task: int = 200,
        memory_size: int = 1000,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        ogd = OGDPlugin(samples_per_task, memory_size)
        super().__init__(model=model, plugins=[*(plugins or ()), ogd], **kwargs)
