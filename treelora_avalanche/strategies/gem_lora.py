"""GEM (Lopez-Paz & Ranzato, NeurIPS 2017) on a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import GEMPlugin, SupervisedPlugin
from torch import nn

from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


@positional_model
class GEMLoRA(SeqLoRA):
    """:class:`SeqLoRA` with Avalanche's gradient episodic memory on what is trained.

    Stores samples, and needs a pass over each past experience's at every step: its step grows with
    the stream.

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param patterns_per_experience: samples stored of each experience; the TreeLoRA paper's is 100.
    :param memory_strength: margin of the projection; the TreeLoRA paper's is 0.05.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        patterns_per_experience: int = 100,
        memory_strength: float = 0.05,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        if patterns_per_experience < 1:
            raise ValueError(
                f"`patterns_per_experience` must be at least 1, and is {patterns_per_experience}."
            )
        if not memory_strength >= 0:
            raise ValueError(f"`memory_strength` must be at least 0, and is {memory_strength}.")
        gem = GEMPlugin(patterns_per_experience, memory_strength)
        super().__init__(model=model, plugins=[*(plugins or ()), gem], **kwargs)
