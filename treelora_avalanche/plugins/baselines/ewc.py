"""EWC with the Fisher information of single samples (Kirkpatrick et al., PNAS 2017)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import EWCPlugin
from avalanche.training.utils import ParamData


class SampleFisherEWCPlugin(EWCPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Avalanche's :class:`~avalanche.training.plugins.EWCPlugin` with a Fisher of single samples.

    ``F_i = 1/n sum_x (d log p(y_x | x) / d w_i)^2`` over n training samples x and their labels.
    Avalanche squares the gradients of mini-batches instead. In the mean of B gradients that point
    in all directions most of each cancels, so that their square is about F / B, and the penalty as
    much weaker as batches are larger.

    A sample is a batch of its own, in evaluation mode: one forward and backward pass per sample,
    for at most ``n_samples`` that are drawn at random. Works with any strategy. Task labels are not
    used. Example::

        strategy = SeqLoRA(model, plugins=[SampleFisherEWCPlugin(50.0, mode="online")])

    :param ewc_lambda: strength of the penalty.
    :param mode: ``"online"`` or ``"separate"``, see Avalanche's.
    :param decay_factor: weight of the past importance when the next is added (online).
    :param n_samples: samples of an experience that its Fisher is computed from.
    :raises ValueError: if ``n_samples`` is below 1.
    """

    def __init__(
        self,
        ewc_lambda: float,
        mode: str = "online",
        decay_factor: float | None = 1.0,
        n_samples: int = 200,
    ):
        if n_samples < 1:
            raise ValueError(
                f"`fisher_samples` should be at least 1, but is {n_samples}. Typical: 200."
            )
        super().__init__(ewc_lambda, mode, decay_factor if mode == "online" else None)
        self.n_samples = n_samples

    def compute_importances(
        self,
        model: Any,
        criterion: Any,
        optimizer: Any,
        dataset: Any,
        device: Any,
        batch_size: int,
        num_workers: int = 0,
    ) -> dict[str, ParamData]:
        """Returns the diagonal of the Fisher information, by name of the parameter.

        :param model: the strategy's model.
        :param criterion: its loss.
        :param optimizer: its optimizer.
        :param dataset: the experience's training data.
        :param device: device of the model.
        :param batch_size: ignored; every sample is a batch.
        :param num_workers: see :class:`torch.utils.data.DataLoader`.
        """
        drawn = torch.randperm(len(dataset))[: self.n_samples].tolist()
        samples = dataset.eval().subset(drawn)
        return super().compute_importances(
            model, criterion, optimizer, samples, device, 1, num_workers
        )
