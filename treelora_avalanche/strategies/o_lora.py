"""O-LoRA (Wang et al., EMNLP Findings 2023, arXiv 2310.14152)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import PastAdapters
from treelora_avalanche.plugins import OLoRAPlugin
from treelora_avalanche.strategies.base.arguments import UnmergedLoRAOptions
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class OLoRA(SeqLoRA):
    """One adapter per task, summed at inference, each factor A orthogonal to the past ones.

    Adds ``lambda_1 * sum_{i < t} ||A_i A_t^T||`` to the loss of task t, see
    :class:`~treelora_avalanche.plugins.OLoRAPlugin`; past adapters stay in the forward pass, see
    :class:`~treelora_avalanche.adapters.PastAdapters`. Stores one adapter per task. Task labels are
    not used.

    Example::

        strategy = OLoRA(model, orthogonality=0.5)

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param orthogonality: strength lambda_1 of the penalty; the paper's is 0.5.
    :param norm: ``"absolute"`` sums the absolute values of the inner products of rows, as the
        released code; ``"squared"`` their squares, as the paper.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        orthogonality: float = 0.5,
        norm: str = "absolute",
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[UnmergedLoRAOptions],
    ):
        self.past = PastAdapters()
        o_lora = OLoRAPlugin(self.past, orthogonality, norm)
        super().__init__(model=model, plugins=[*(plugins or ()), o_lora], **kwargs)
        self.past.attach(self.model)
