"""Classifier alignment of SLCA (Zhang et al., ICCV 2023, arXiv 2303.05118)."""

from __future__ import annotations

from typing import Any

from treelora_avalanche.models.features.gaussians import Gaussians
from treelora_avalanche.plugins.trained_head import TrainedHeadPlugin


class ClassifierAlignmentPlugin(TrainedHeadPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Aligns the classifier after every task, on features drawn from one Gaussian per class.

    The features of class c are drawn from ``N(mean_c, cov_c)``, as they were after the task of the
    class: a slow backbone hardly moves them. The loss is the cross-entropy of normalised logits,
    ``l / (τ |l|)``. During a task it compares the task's own classes alone. Stores the mean and at
    most 64 directions of the covariance per class. Task labels are not used. Example::

        strategy = Naive(model=model, plugins=[ClassifierAlignmentPlugin()], ...)

    :param temperature: τ; 0.1 in the paper.
    :param epochs: number of optimisation steps.
    :param n_per_class: features per class and step.
    :param learning_rate: learning rate of Adam.
    :param seed: seed of the features.
    :raises ValueError: if ``temperature`` is not positive.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        epochs: int = 120,
        n_per_class: int = 16,
        learning_rate: float = 0.01,
        seed: int = 0,
    ):
        super().__init__(
            epochs=epochs,
            n_per_class=n_per_class,
            learning_rate=learning_rate,
            kind=Gaussians(shrinkage=0.0),
            seed=seed,
        )
        if not temperature > 0:
            raise ValueError(
                f"`temperature` should be above 0, but is {temperature}. The paper's is 0.1."
            )
        self.temperature = temperature

    def _follows_drift(self, strategy: Any) -> bool:
        return False
