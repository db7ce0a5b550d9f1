"""SD-LoRA (Wu et al., ICLR 2025, arXiv 2501.13198)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import PastDirections
from treelora_avalanche.plugins import SDLoRAPlugin
from treelora_avalanche.strategies.base.arguments import UnmergedLoRAOptions
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class SDLoRA(SeqLoRA):
    """One adapter per task, summed: past directions are frozen, all magnitudes trained.

    With s LoRA's scaling, ``h' = W x + sum_{k<t} alpha_k B_k A_k x / ||B_k A_k||_F
    + alpha_t s B_t A_t x``, where task t trains A_t, B_t and all alpha, see
    :class:`~treelora_avalanche.adapters.PastDirections`. The paper's B is A here, and vice versa,
    as usual in LoRA. The released code has one alpha per task for all layers, divides by
    ``||A_k||_F ||B_k||_F``, and starts every alpha at 0.8 with each task; here each layer has its
    own, and only that of the new direction starts at 0.8: those of the past go on, and the output
    of the model does not change when a task begins. Logits of past classes are not masked. Stores
    one adapter per task. Task labels are not used.

    Example::

        strategy = SDLoRA(model, rank=10)

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`; the paper's rank is 10.
    :raises ValueError: if an argument is out of range; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[UnmergedLoRAOptions],
    ):
        self.past = PastDirections()
        sd_lora = SDLoRAPlugin(self.past)
        super().__init__(model=model, plugins=[*(plugins or ()), sd_lora], **kwargs)
        self.past.attach(self.model)
