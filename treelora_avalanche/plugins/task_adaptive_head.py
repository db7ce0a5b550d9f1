"""The head of a class-incremental stream, re-trained after every task on remembered statistics.

HiDe-Prompt (Wang et al., NeurIPS 2023) calls it task-adaptive prediction; TreeLoRA takes it over.
Within a task the loss compares the task's own classes alone, so the head forgets nothing there that
it would have to learn again; what separates the classes of different tasks is learned afterwards,
from pseudo-features drawn around the class means. No image is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from treelora_avalanche.models.features import classifier_of, extract_features


class ClassStatistics(NamedTuple):
    """A class, as the features of one task have shown it.

    :param label: the class.
    :param task: number of the task, in the order of training.
    :param mean: mean of the features, ``(dim,)``.
    :param factor: ``(n, dim)``; the covariance is ``factor.T @ factor``. As a factor it is never
        too singular to draw from: a class of a single sample has ``n = 0``.
    """

    label: int
    task: int
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, label: int, task: int, features: Tensor, max_rank: int = 64) -> ClassStatistics:
        """Statistics of a class.

        :param label: the class.
        :param task: number of the task.
        :param features: all features of the class in this task, ``(n_samples, dim)``.
        :param max_rank: directions kept of the covariance, the widest first.
        """
        mean = features.mean(0)
        n = len(features)
        factor = (features - mean) / max(1, n - 1) ** 0.5
        if n > max_rank:
            _, s, vh = torch.linalg.svd(factor, full_matrices=False)
            factor = s[:max_rank, None] * vh[:max_rank]
        return cls(label, task, mean, factor if n > 1 else factor[:0])

    def moved(self, weight: Tensor, bias: Tensor) -> ClassStatistics:
        """The statistics after the features have moved by ``x -> x + x @ weight + bias``."""
        return self._replace(
            mean=self.mean + self.mean @ weight + bias, factor=self.factor + self.factor @ weight
        )


class PseudoFeatures:
    """Draws features as the classes would have them.

    A class of few samples knows little of its own covariance. Therefore each class is drawn with
    ``(1 - shrinkage)`` of its own and ``shrinkage`` of the mean covariance of all classes.

    :param statistics: the classes.
    :param shrinkage: share of the mean covariance, between 0 and 1.
    """

    def __init__(self, statistics: Sequence[ClassStatistics], shrinkage: float = 0.5):
        self.statistics = list(statistics)
        self.labels = torch.tensor(
            [s.label for s in statistics], device=statistics[0].mean.device
        )  # (n_classes,)
        self._means = torch.stack([s.mean for s in statistics])
        self._own = (1 - shrinkage) ** 0.5
        rank = max(len(s.factor) for s in statistics)
        # Rows of zeros add nothing to a covariance.
        self._factors = torch.stack(
            [nn.functional.pad(s.factor, (0, 0, 0, rank - len(s.factor))) for s in statistics]
        )  # (n_classes, rank, dim)
        pooled = torch.cat([s.factor for s in statistics])
        covariance = pooled.T @ pooled / len(self.statistics)
        values, vectors = torch.linalg.eigh(covariance)
        # Not a Cholesky factor: with few samples the mean covariance is singular too.
        self._shared = (shrinkage * values.clamp(min=0)).sqrt()[:, None] * vectors.T  # (dim, dim)

    def draw(self, n_per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws from every class.

        :param n_per_class: features per class.
        :param generator: source of randomness, on the CPU.
        :return: features ``(n_classes * n_per_class, dim)``, and their labels.
        """
        n_classes, rank, dim = self._factors.shape
        device = self._means.device
        own = torch.randn(n_classes, n_per_class, rank, generator=generator).to(device)
        shared = torch.randn(n_classes, n_per_class, dim, generator=generator).to(device)
        features = self._own * torch.bmm(own, self._factors) + shared @ self._shared
        features = features + self._means[:, None]
        return features.flatten(0, 1), self.labels.repeat_interleave(n_per_class)


def train_head(
    head: nn.Linear,
    pseudo_features: PseudoFeatures,
    *,
    epochs: int,
    n_per_class: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Trains a classifier, in place, on pseudo-features of the classes seen so far.

    Outputs of classes never seen are left out of the loss, and their weights as they are.

    :param head: the classifier.
    :param pseudo_features: where the features come from.
    :param epochs: steps; every one draws anew.
    :param n_per_class: features per class and step.
    :param learning_rate: of Adam, falling to 0 along a cosine.
    :param generator: source of randomness, on the CPU.
    """
    seen, rows = pseudo_features.labels.unique(return_inverse=True)
    weight = head.weight.detach()[seen].requires_grad_()
    bias = head.bias.detach()[seen].requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    targets = rows.repeat_interleave(n_per_class)
    with torch.enable_grad():
        for _ in range(epochs):
            features, _ = pseudo_features.draw(n_per_class, generator)
            loss = nn.functional.cross_entropy(features @ weight.T + bias, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        head.weight[seen] = weight
        head.bias[seen] = bias


def feature_drift(before: Tensor, after: Tensor, ridge: float = 0.01) -> tuple[Tensor, Tensor]:
    """The linear map by which a task's training has moved the features, by least squares.

    Where old classes have gone is read from what has happened to the current images.

    :param before: features of the current images before the task, ``(n_samples, dim)``.
    :param after: features of the same images after it.
    :param ridge: pulls the map towards a mere shift, in units of the features' mean square.
    :return: ``weight (dim, dim)`` and ``bias (dim,)`` of ``x -> x + x @ weight + bias``.
    """
    center, moved = before.mean(0), (after - before).mean(0)
    x, y = before - center, after - before - moved
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().sum() + torch.finfo(gram.dtype).tiny)
    weight = torch.linalg.solve(gram, x.T @ y)
    return weight, moved - center @ weight


class WithinTaskLoss(nn.Module):
    """A criterion that compares only the classes of the current experience.

    A sample of another class (from a replay memory) competes with these by its own output.

    :param criterion: the criterion of logits ``(batch, n_classes)`` and targets ``(batch,)``.
    """

    def __init__(self, criterion: Any):
        super().__init__()
        self.criterion = criterion
        self.current: Tensor | None = None  # (n_classes_of_the_experience,)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        keep = torch.zeros_like(logits, dtype=torch.bool)
        keep[:, self.current] = True
        keep.scatter_(1, targets[:, None], True)
        return self.criterion(logits.masked_fill(~keep, float("-inf")), targets)


class TaskAdaptiveHeadPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Within-task loss, class statistics, and a head re-trained on pseudo-features.

    Attaches to any strategy, Avalanche's own too, whose model ends in a linear classifier. It costs
    one pass over the data before and one after each experience, and stores per class its mean and
    at most ``max_rank`` directions of its covariance. In a domain-incremental stream a class has
    statistics for every task. Task labels are not used.

    :param epochs: steps in which the head is re-trained.
    :param n_per_class: pseudo-features per class and step.
    :param learning_rate: learning rate of the re-training.
    :param shrinkage: see :class:`PseudoFeatures`.
    :param max_rank: see :class:`ClassStatistics`.
    :param follow_drift: move the statistics of old classes along with the features, as the current
        images show it (:func:`feature_drift`); False where each class keeps its own adapter.
    :param seed: seed of the pseudo-features.
    """

    def __init__(
        self,
        *,
        epochs: int = 120,
        n_per_class: int = 16,
        learning_rate: float = 0.01,
        shrinkage: float = 0.5,
        max_rank: int = 64,
        follow_drift: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self.epochs = epochs
        self.n_per_class = n_per_class
        self.learning_rate = learning_rate
        self.shrinkage = shrinkage
        self.max_rank = max_rank
        self.follow_drift = follow_drift
        self.seed = seed
        self.n_tasks = 0
        self.statistics: list[ClassStatistics] = []

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Narrows the loss to the current classes, and looks at the features before the task."""
        if not isinstance(strategy._criterion, WithinTaskLoss):
            strategy._criterion = WithinTaskLoss(strategy._criterion)
        classes = sorted(strategy.experience.classes_in_this_experience)
        strategy._criterion.current = torch.tensor(classes, device=strategy.device)
        if self.follow_drift and self.statistics:
            self._before, _ = self._features(strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Takes the statistics of the new classes and re-trains the head on all."""
        features, targets = self._features(strategy)
        if self.follow_drift and self.statistics:
            drift = feature_drift(self._before, features)
            self.statistics = [s.moved(*drift) for s in self.statistics]
            del self._before
        for label in targets.unique().tolist():
            of_class = features[targets == label]
            self.statistics.append(ClassStatistics.of(label, self.n_tasks, of_class, self.max_rank))
        self.n_tasks += 1
        train_head(
            classifier_of(strategy.model),
            PseudoFeatures(self.statistics, self.shrinkage),
            epochs=self.epochs,
            n_per_class=self.n_per_class,
            learning_rate=self.learning_rate,
            generator=torch.Generator().manual_seed(self.seed + self.n_tasks),
        )

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Gives the strategy its own criterion back."""
        if isinstance(strategy._criterion, WithinTaskLoss):
            strategy._criterion = strategy._criterion.criterion

    def _features(self, strategy: Any) -> tuple[Tensor, Tensor]:
        return extract_features(
            strategy.model,
            strategy.experience.dataset.eval(),
            batch_size=strategy.eval_mb_size,
            device=strategy.device,
        )
