"""How each kind of model is trained where the user says nothing."""

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

from treelora_avalanche.models.token_loss import TokenCrossEntropy

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

SCHEDULES = ("constant", "cosine")


class TrainingDefaults(NamedTuple):
    """How one kind of model is trained."""

    optimizer: OptimizerFactory
    schedule: str
    criterion: Callable[[], nn.Module]
    train_mb_size: int
    train_epochs: int
    eval_mb_size: int
    evaluator: Callable[[], EvaluationPlugin]


def language_evaluator() -> EvaluationPlugin:
    """Avalanche's default evaluator for language models: losses and times.

    Accuracy, which is part of Avalanche's own, does not take the logits of tokens.
    """
    return EvaluationPlugin(
        loss_metrics(minibatch=False, epoch=True, experience=True, stream=True),
        timing_metrics(epoch=True),
        loggers=[InteractiveLogger()],
    )


VISION_TRAINING = TrainingDefaults(
    optimizer=partial(torch.optim.Adam, lr=0.005),
    schedule="constant",
    criterion=nn.CrossEntropyLoss,
    train_mb_size=192,
    train_epochs=20,
    eval_mb_size=192,
    evaluator=default_evaluator,
)
"""TreeLoRA's for vision transformers (Appendix A.3)."""

LANGUAGE_TRAINING = TrainingDefaults(
    optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0),
    schedule="cosine",
    criterion=TokenCrossEntropy,
    train_mb_size=4,
    train_epochs=1,
    eval_mb_size=16,
    evaluator=language_evaluator,
)
"""TreeLoRA's for language models; of the two learning rates that the paper gives, that of TRACE's
scripts. The epochs differ from task to task, see :mod:`treelora_avalanche.scenarios.trace`."""
