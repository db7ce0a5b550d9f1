"""O-LoRA (Wang et al., EMNLP Findings 2023, arXiv 2310.14152) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.adapters import PastAdapters
from treelora_avalanche.plugins import OLoRAPlugin
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


@positional_model
class OLoRA(SeqLoRA):
    """One adapter per task, all of them in use, each A orthogonal to those before.

    For the penalty see :class:`~treelora_avalanche.plugins.OLoRAPlugin`, and for how past adapters
    go on answering :class:`~treelora_avalanche.adapters.PastAdapters`. Stores one adapter per task.

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param orthogonality: strength lambda_1 of the penalty; the paper's is 0.5.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range; the model is then as it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        orthogonality: float = 0.5,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        self.past = PastAdapters()
        o_lora = OLoRAPlugin(self.past, orthogonality)
        super().__init__(model=model, plugins=[*(plugins or ()), o_lora], **kwargs)
        self.past.attach(self.model)
