"""Predictions of a trained strategy, outside of and during Avalanche's evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.metrics import find_text_generator
from treelora_avalanche.testing.errors import INFER_THE_TASK, NO_TASK_LABELS, ContractError

NEW_TOKENS = 6
"""Tokens generated per prompt: a difference between two models shows in the first few."""


class Predictions(NamedTuple):
    """Logits and generated texts for the test samples of a stream.

    :param logits: ``(n_samples, n_classes)``; for texts ``(n_tokens, n_ids)``.
    :param texts: generated texts; empty for images.
    """

    logits: Tensor
    texts: list[str]


class EvaluatedBatch(NamedTuple):
    """A mini-batch of an evaluation, with the strategy's output."""

    inputs: Tensor
    targets: Tensor
    task_labels: Tensor
    outputs: Tensor


def predict(
    strategy: Any,
    inputs: Tensor,
    targets: Tensor,
    prompts: Sequence[str] = (),
    *,
    batch_size: int = 64,
) -> Predictions:
    """Returns the predictions of a strategy that receives no experience and only task label 0.

    :param strategy: a trained strategy.
    :param inputs: images, or token sequences padded with -1, ``(n, ...)``.
    :param targets: their targets. The strategy receives whether a token has a target, and not
        which one.
    :param prompts: prompts to generate from.
    :param batch_size: samples per forward pass.
    """
    outputs = []
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits = forward(strategy, x, y)
        if logits.ndim == 3:  # of texts, which are padded
            logits = logits.transpose(1, 2)[x[:, : logits.shape[2]] >= 0]
        outputs.append(logits.cpu())
    texts: list[str] = []
    if prompts:
        generator = find_text_generator(strategy.model)
        texts = generator.generate(list(prompts), NEW_TOKENS, batch_size)
    return Predictions(torch.cat(outputs), texts)


def forward(strategy: Any, inputs: Tensor, targets: Tensor, task_label: int = 0) -> Tensor:
    """Returns the strategy's output for a mini-batch, without an experience.

    :param strategy: a trained strategy.
    :param inputs: the inputs.
    :param targets: their targets, see :func:`predict`.
    :param task_label: the task label of all samples.
    :raises ContractError: if the strategy fails, as one that needs the experience does.
    """
    labels = torch.full((len(inputs),), task_label)
    batch = [t.to(strategy.device) for t in (inputs, targets.clamp(max=0), labels)]
    state = {"mbatch": batch, "experience": None, "is_training": False}
    before = {name: getattr(strategy, name, None) for name in state}
    was_training = strategy.model.training
    vars(strategy).update(state)
    strategy.model.eval()
    try:
        with torch.no_grad():
            return strategy.forward()  # type: ignore[no-any-return]
    except Exception as error:
        raise ContractError(
            NO_TASK_LABELS,
            f"the forward pass with task label {task_label} and no experience raised {error!r}.",
            INFER_THE_TASK,
        ) from error
    finally:
        vars(strategy).update(before)
        strategy.model.train(was_training)


@contextmanager
def single_thread() -> Iterator[None]:
    """One CPU thread inside the context: several split sums differently in each process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _EvaluationRecorder(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    is_stored = False

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[EvaluatedBatch] = []

    def after_eval_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        output = strategy.mb_output.clone()
        batch = EvaluatedBatch(strategy.mb_x, strategy.mb_y, strategy.mb_task_id, output)
        self.batches.append(batch)


def record_evaluation(strategy: Any, stream: Any) -> list[EvaluatedBatch]:
    """Evaluates a stream and returns all mini-batches with the strategy's outputs.

    :param strategy: a trained strategy.
    :param stream: the experiences to evaluate.
    """
    recorder = _EvaluationRecorder()
    strategy.plugins.append(recorder)
    try:
        strategy.eval(stream)
    finally:
        strategy.plugins.remove(recorder)
    return recorder.batches
