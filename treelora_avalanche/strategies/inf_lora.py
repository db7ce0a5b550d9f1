"""InfLoRA (Liang & Li, CVPR 2024, arXiv 2404.00228)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import PastAdapters
from treelora_avalanche.plugins import InfLoRAPlugin
from treelora_avalanche.strategies.base.arguments import UnmergedLoRAOptions
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class InfLoRA(SeqLoRA):
    """One adapter per task, summed at inference, each orthogonal to the inputs of past tasks.

    For the method see :class:`~treelora_avalanche.plugins.InfLoRAPlugin`; past adapters stay in the
    forward pass, see :class:`~treelora_avalanche.adapters.PastAdapters`. Stores one adapter per
    task, and per layer at most ``n_in^2 / 2`` values in total. Task labels are not used.

    Example::

        strategy = InfLoRA(model, rank=10, threshold=0.95)

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param threshold: share epsilon of the inputs' energy that new tasks must not use, rising to 1
        over the stream; the paper's is 0.95 for CIFAR-100 and 0.98 for ImageNet-R.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`; the paper's rank is 10.
    :raises ValueError: if an argument is out of range; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.95,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[UnmergedLoRAOptions],
    ):
        self.past = PastAdapters()
        inf_lora = InfLoRAPlugin(self.past, threshold)
        super().__init__(model=model, plugins=[*(plugins or ()), inf_lora], **kwargs)
        self.past.attach(self.model)
