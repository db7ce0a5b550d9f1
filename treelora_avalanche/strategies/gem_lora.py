"""GEM (Lopez-Paz & Ranzato, NeurIPS 2017, arXiv 1706.08840) on a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import GEMPlugin, SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.plugins import WithinTaskGEMPlugin
from treelora_avalanche.strategies.base.arguments import LoRAOptions
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class GEMLoRA(SeqLoRA):
    """:class:`SeqLoRA` with gradient episodic memory on the trained parameters.

    Each step projects the gradient g to the nearest one with ``<g, g_k> >= 0`` for the gradient g_k
    on the memory of every past task k: one forward and backward pass per past task, so step time
    grows with the stream. Stores ``patterns_per_experience`` samples per task. Task labels are not
    used.

    Example::

        strategy = GEMLoRA(model, patterns_per_experience=100)

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param patterns_per_experience: samples stored per experience; the TreeLoRA paper's is 100.
    :param memory_strength: margin of the projection; the TreeLoRA paper's is 0.05.
    :param within_task: whether the loss of a memory compares the classes of its task alone, as in
        the released code (:class:`~treelora_avalanche.plugins.WithinTaskGEMPlugin`), or all, which
        is better where predictions are among all classes (docs/methods.md).
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        patterns_per_experience: int = 100,
        memory_strength: float = 0.05,
        within_task: bool = False,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[LoRAOptions],
    ):
        if patterns_per_experience < 1:
            raise ValueError(
                f"`patterns_per_experience` should be at least 1, but is {patterns_per_experience}."
                " Use SeqLoRA to store no samples."
            )
        if not memory_strength >= 0:
            raise ValueError(
                f"`memory_strength` should be at least 0, but is {memory_strength}. Use 0 for no "
                "margin."
            )
        kind = WithinTaskGEMPlugin if within_task else GEMPlugin
        gem = kind(patterns_per_experience, memory_strength)
        super().__init__(model=model, plugins=[*(plugins or ()), gem], **kwargs)
