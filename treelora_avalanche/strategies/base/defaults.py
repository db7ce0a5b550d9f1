"""The default optimizer, criterion and evaluator for each kind of model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from avalanche.evaluation.metrics import loss_metrics, timing_metrics
from avalanche.logging import InteractiveLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from torch import nn
from torch.optim import Optimizer

from treelora_avalanche.defaults import LANGUAGE_TRAINING, VISION_TRAINING, TrainingDefaults
from treelora_avalanche.models.token_loss import TokenCrossEntropy

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class Training(NamedTuple):
    """Default optimizer, criterion and evaluator for one kind of model.

    >>> VISION.optimizer(lr=0.001)(model.parameters())  # Adam

    :param numbers: the hyper-parameters.
    :param criterion: constructor of the loss.
    :param evaluator: constructor of the evaluation plugin.
    """

    numbers: TrainingDefaults
    criterion: Callable[[], nn.Module]
    evaluator: Callable[[], EvaluationPlugin]

    def optimizer(self, lr: float | None = None) -> OptimizerFactory:
        """Returns a constructor of the optimizer from parameters.

        :param lr: learning rate; by default that of :attr:`numbers`.
        """
        kind = getattr(torch.optim, self.numbers.optimizer)
        # The paper decays no weights; Adam's default is 0, AdamW's is not.
        return partial(kind, lr=lr or self.numbers.lr, weight_decay=0.0)


def language_evaluator() -> EvaluationPlugin:
    """Returns the default evaluator for language models, which logs losses and times.

    Avalanche's own includes accuracy, which does not accept token logits.
    """
    return EvaluationPlugin(
        loss_metrics(minibatch=False, epoch=True, experience=True, stream=True),
        timing_metrics(epoch=True),
        loggers=[InteractiveLogger()],
    )


VISION = Training(VISION_TRAINING, nn.CrossEntropyLoss, default_evaluator)
LANGUAGE = Training(LANGUAGE_TRAINING, TokenCrossEntropy, language_evaluator)
