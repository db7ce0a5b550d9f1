"""Orthogonal gradient descent (Farajtabar et al., AISTATS 2020, arXiv 1910.07104) on LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.plugins import OGDPlugin
from treelora_avalanche.strategies.base.arguments import LoRAOptions
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class OGD(SeqLoRA):
    """:class:`SeqLoRA` whose steps are projected orthogonal to the gradients of past samples.

    For the method see :class:`~treelora_avalanche.plugins.OGDPlugin`. Stores per task
    ``samples_per_task`` vectors with one value per trained parameter, within the budget. Task
    labels are not used.

    Example::

        strategy = OGD(model, samples_per_task=200, memory_size=1000)

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param samples_per_task: samples of a task whose gradients are stored; the paper's is 200.
    :param memory_size: vectors stored over all tasks, which share a full memory equally.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range, or ``memory_size`` is below
        ``samples_per_task``; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        samples_per_task: int = 200,
        memory_size: int = 1000,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[LoRAOptions],
    ):
        ogd = OGDPlugin(samples_per_task, memory_size)
        super().__init__(model=model, plugins=[*(plugins or ()), ogd], **kwargs)
