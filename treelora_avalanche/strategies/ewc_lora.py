"""EWC (Kirkpatrick et al., PNAS 2017) on a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import EWCPlugin, SupervisedPlugin
from torch import nn

from treelora_avalanche.choices import check_known
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA

MODES = ("online", "separate")


@positional_model
class EWCLoRA(SeqLoRA):
    """:class:`SeqLoRA` with Avalanche's elastic weight consolidation on what is trained.

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param ewc_lambda: strength of the penalty; the TreeLoRA paper's is 50.
    :param mode: ``"online"`` keeps one importance per parameter; ``"separate"`` one per parameter
        and experience, so that its memory and its step grow with the stream.
    :param decay_factor: weight of the past importance when the next is added (online).
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        ewc_lambda: float = 50.0,
        mode: str = "online",
        decay_factor: float = 1.0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        check_known("`mode`", mode, MODES)
        if not ewc_lambda >= 0:
            raise ValueError(f"`ewc_lambda` must be at least 0, and is {ewc_lambda}.")
        ewc = EWCPlugin(ewc_lambda, mode, decay_factor if mode == "online" else None)
        super().__init__(model=model, plugins=[*(plugins or ()), ewc], **kwargs)
