"""A LoRA adapter pulled towards the one of the task before: the control of every regulariser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.plugins import L2AnchorPlugin
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


@positional_model
class L2Anchor(SeqLoRA):
    """:class:`SeqLoRA` pulled, in squared L2, towards the adapter of the task before.

    For the penalty see :class:`~treelora_avalanche.plugins.L2AnchorPlugin`. Stores nothing per
    task.

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param strength: strength of the pull.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range; the model is then as it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        strength: float = 1.0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        anchor = L2AnchorPlugin(strength)
        super().__init__(model=model, plugins=[*(plugins or ()), anchor], **kwargs)
