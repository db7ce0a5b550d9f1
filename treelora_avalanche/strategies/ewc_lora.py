"""EWC (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796) on a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.choices import check_known
from treelora_avalanche.plugins import SampleFisherEWCPlugin
from treelora_avalanche.strategies.base.arguments import LoRAOptions
from treelora_avalanche.strategies.seq_lora import SeqLoRA

MODES = ("online", "separate")


class EWCLoRA(SeqLoRA):
    """:class:`SeqLoRA` with elastic weight consolidation of the trained parameters.

    The penalty is ``lambda * sum_i F_i (w_i - w*_i)^2`` with the diagonal Fisher information F of
    single samples (Eq. 3, which has ``lambda / 2``), see
    :class:`~treelora_avalanche.plugins.SampleFisherEWCPlugin`. Costs one forward and backward pass
    per sample of the Fisher. Stores two values per trained parameter, with ``mode="separate"`` per
    task. Task labels are not used.

    Example::

        strategy = EWCLoRA(model, ewc_lambda=50.0)

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param ewc_lambda: strength lambda of the penalty; the TreeLoRA paper's is 50. With Avalanche's
        Fisher, of gradients of mini-batches, it has no effect (docs/methods.md).
    :param fisher_samples: training samples of a task, drawn at random, that F is computed from.
    :param mode: ``"online"`` keeps one importance per parameter; ``"separate"`` one per parameter
        and experience, so that memory and step time grow with the stream.
    :param decay_factor: weight of the past importance when the next is added (online).
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ewc_lambda: float = 50.0,
        fisher_samples: int = 200,
        mode: str = "online",
        decay_factor: float = 1.0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[LoRAOptions],
    ):
        check_known("`mode`", mode, MODES)
        if not ewc_lambda >= 0:
            raise ValueError(
                f"`ewc_lambda` should be at least 0, but is {ewc_lambda}. Use 0 for no penalty."
            )
        ewc = SampleFisherEWCPlugin(ewc_lambda, mode, decay_factor, fisher_samples)
        super().__init__(model=model, plugins=[*(plugins or ()), ewc], **kwargs)
