"""L2 anchor: LoRA with a squared L2 penalty towards the previous task's adapter."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.plugins import L2AnchorPlugin
from treelora_avalanche.strategies.base.arguments import LoRAOptions
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class L2Anchor(SeqLoRA):
    """:class:`SeqLoRA` with a squared L2 penalty towards the adapter of the previous task.

    The control for every regulariser: a constant pull that compares no tasks. For the penalty see
    :class:`~treelora_avalanche.plugins.L2AnchorPlugin`. Stores nothing per task. Task labels are
    not used.

    Example::

        strategy = L2Anchor(model, strength=1.0)

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param strength: strength of the penalty.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[LoRAOptions],
    ):
        anchor = L2AnchorPlugin(strength)
        super().__init__(model=model, plugins=[*(plugins or ()), anchor], **kwargs)
