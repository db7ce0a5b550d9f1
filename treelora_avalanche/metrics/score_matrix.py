"""Score matrix of a stream: formulas on a plain matrix, and metric plugins that record it.

Let f_i(w_j) be the score on experience i after training on the j-th one. The TreeLoRA paper
(arXiv 2506.10355) reports, after n experiences,

    Op_n  = (1/n) sum_(i<=n) f_i(w_n)                  higher is better
    Bwt_n = (1/n) sum_(i<=n) (f_i(w_i) - f_i(w_n))     positive is forgetting, lower is better

Avalanche's `StreamBWT` has the opposite sign: Bwt_n = -(n-1)/n StreamBWT. The subclasses of
:class:`ScoreMatrix` define the score: accuracy, or a score of generated text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricResult, MetricValue
from avalanche.evaluation.metric_utils import get_metric_name, stream_type
from torch import Tensor

from treelora_avalanche.experiences import task_number
from treelora_avalanche.state import check_keys

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate

SIGN = "_PositiveIsForgetting"
"""Part of the name of Bwt in logs, where Avalanche's ``StreamBWT`` has the opposite sign."""

MatrixLike = Tensor | Sequence[Sequence[float]]


def _seen_square(matrix: MatrixLike) -> Tensor:
    """Returns the n columns of the n experiences trained so far, ``(n, n)``."""
    square = torch.as_tensor(matrix, dtype=torch.float64)
    if square.ndim != 2 or square.shape[0] == 0 or square.shape[1] < square.shape[0]:
        raise ValueError(
            "`matrix` should have one row per trained experience and at least as many columns, "
            f"but its shape is {tuple(square.shape)}. Evaluate at least the experiences trained."
        )
    return square[:, : square.shape[0]]


def overall_performance(matrix: MatrixLike) -> float:
    """Returns Op_n = (1/n) sum_(i<=n) f_i(w_n). **Higher is better.**

    Every experience has the same weight, unlike in Avalanche's `Top1_Acc_Stream`, which is a mean
    over samples and includes unseen experiences.

    >>> overall_performance([[0.75, 0.0], [0.25, 1.0]])
    0.625

    :param matrix: f_i(w_j) at row j, column i; experiences in order of training. Columns beyond
        the number of rows (experiences not trained yet) are ignored.
    :return: Op_n; NaN if an experience was not evaluated.
    :raises ValueError: if ``matrix`` has no rows, or fewer columns than rows.
    """
    return _seen_square(matrix)[-1].mean().item()


def _total_drop(matrix: MatrixLike) -> tuple[float, int]:
    """Returns sum_(i<=n) (f_i(w_i) - f_i(w_n)), whose i = n term is 0, and n."""
    square = _seen_square(matrix)
    return (square.diagonal() - square[-1]).sum().item(), len(square)


def backward_transfer(matrix: MatrixLike) -> float:
    """Returns Bwt_n = (1/n) sum_(i<=n) (f_i(w_i) - f_i(w_n)) of the TreeLoRA paper.

    **Positive is forgetting, lower is better.** Avalanche averages over the n - 1 experiences
    before the last, and its `StreamBWT` has the opposite sign:
    Bwt_n = (n-1)/n StreamForgetting = -(n-1)/n StreamBWT.

    >>> backward_transfer([[0.75, 0.0], [0.25, 1.0]])
    0.25

    :param matrix: f_i(w_j) at row j, column i; experiences in order of training.
    :return: Bwt_n, whose i = n term is 0; NaN if one of these scores was not evaluated.
    :raises ValueError: if ``matrix`` has no rows, or fewer columns than rows.
    """
    drop, n = _total_drop(matrix)
    return drop / n


def forgetting(matrix: MatrixLike) -> float:
    """Returns (1/(n-1)) sum_(i<n) (f_i(w_i) - f_i(w_n)), Avalanche's `StreamForgetting`.

    **Positive is forgetting, lower is better.** It is n/(n-1) Bwt_n, and -`StreamBWT`.

    >>> forgetting([[0.75, 0.0], [0.25, 1.0]])
    0.5

    :param matrix: f_i(w_j) at row j, column i; experiences in order of training.
    :return: the mean drop; 0 for a single experience.
    :raises ValueError: if ``matrix`` has no rows, or fewer columns than rows.
    """
    drop, n = _total_drop(matrix)
    return drop / (n - 1) if n > 1 else 0.0


class ScoreMatrix(PluginMetric[Tensor]):
    """Records f_i(w_j): the score on every experience after every experience trained.

    Rows follow the order of training, whatever the order of the stream. A row belongs to one
    trained experience; a second evaluation before the next training overwrites it, and so does the
    evaluation after a second training on the same experience. Evaluations before any training are
    kept separately, in :attr:`untrained`, and enter neither Op nor Bwt. Each stream has its own
    matrix, since `eval_every` evaluates training streams by default.

    A subclass passes each score to :meth:`record`. Example::

        class Loss(ScoreMatrix):
            def after_eval_exp(self, strategy):
                return self.record(strategy, float(strategy.loss))
    """

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[int] = []
        """ Ids of the trained experiences, in order of their first training. The parts of a task in
        an online stream have the id of that task; parts of several tasks have ids below 0. """
        self.untrained: dict[str, dict[int, float]] = {}
        """ Score by stream and experience id before any training, if evaluated. """
        self._rows: dict[str, dict[int, dict[int, float]]] = {}  # stream -> row -> id -> score
        self._last_stream: str | None = None

    def matrix(self, stream: str | None = None) -> Tensor:
        """Returns the matrix so far, a new tensor.

        :param stream: name of the evaluated stream; by default the one evaluated last.
        :return: scores in [0, 1], NaN if not evaluated, ``(n_trained, n_trained + n_unseen)``; row
            j belongs to the j-th trained experience, column i to the i-th. Experiences evaluated
            but not trained yet follow as further columns, by id.
        """
        rows = self._rows.get(stream or self._last_stream or "", {})
        unseen = sorted({i for row in rows.values() for i in row} - set(self.trained))
        columns = self.trained + unseen
        return torch.tensor(
            [[rows.get(j, {}).get(i, math.nan) for i in columns] for j in range(len(self.trained))],
            dtype=torch.float64,
        ).reshape(len(self.trained), len(columns))

    def result(self) -> Tensor:
        """Returns the matrix of the stream evaluated last, see :meth:`matrix`."""
        return self.matrix()

    def reset(self) -> None:
        """Clears all evaluations and the order of training."""
        self.trained = []
        self.untrained = {}
        self._rows = {}
        self._last_stream = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the scores and the order of training, as plain values with string keys."""
        return {
            "trained": list(self.trained),
            "untrained": {
                stream: {str(i): score for i, score in row.items()}
                for stream, row in self.untrained.items()
            },
            "rows": {
                stream: {
                    str(j): {str(i): score for i, score in row.items()} for j, row in rows.items()
                }
                for stream, rows in self._rows.items()
            },
            "last_stream": self._last_stream,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state.

        :param state: as returned by :meth:`state_dict`.
        :raises ValueError: if it lacks keys or has unknown ones; the metric is then unchanged.
        """
        check_keys(state, self.state_dict(), f"the state of {self}")
        untrained = {
            stream: {int(i): score for i, score in row.items()}
            for stream, row in state["untrained"].items()
        }
        rows_of = {
            stream: {int(j): {int(i): score for i, score in row.items()} for j, row in rows.items()}
            for stream, rows in state["rows"].items()
        }
        self.trained = list(state["trained"])
        self.untrained = untrained
        self._rows = rows_of
        self._last_stream = state["last_stream"]

    def before_training_exp(self, strategy: SupervisedTemplate) -> None:
        number = task_number(strategy.experience)
        if number is None:  # a part of several tasks, which is none of those evaluated
            number = -1 - len(self.trained)
        if number not in self.trained:
            self.trained.append(number)

    def before_eval(self, strategy: SupervisedTemplate) -> None:
        self._last_stream = None

    def record(self, strategy: SupervisedTemplate, score: float) -> MetricResult:
        """Records the score of the evaluated experience, and emits it.

        :param strategy: the evaluating strategy.
        :param score: the score, in [0, 1].
        :return: the values that the metric emits for an experience.
        """
        experience: Any = strategy.experience
        task = task_number(experience)
        stream = stream_type(experience)
        self._last_stream = stream
        if self.trained:
            row = self._rows.setdefault(stream, {}).setdefault(len(self.trained) - 1, {})
        else:
            row = self.untrained.setdefault(stream, {})
        row[experience.current_experience if task is None else task] = score
        return self._emit_experience(strategy, score)

    def _emit_experience(self, strategy: SupervisedTemplate, score: float) -> MetricResult:
        name = get_metric_name(self, strategy, add_experience=True)
        return [MetricValue(self, name, score, strategy.clock.train_iterations)]


class NumberOfMatrix(ScoreMatrix):
    """A single number computed from the matrix, emitted at the end of every evaluation.

    It keeps its own matrix, so that it works alone and next to other metrics in any order.
    A subclass defines ``_number``. Example::

        class Worst(NumberOfMatrix, AccuracyMatrix):
            def _number(self, matrix):
                return float(matrix[-1].min())
    """

    def _number(self, matrix: Tensor) -> float:
        raise NotImplementedError

    def result(self) -> float | None:  # type: ignore[override]
        """Returns the number for the stream evaluated last.

        :return: None before any training, or if a score that it needs was not evaluated.
        """
        matrix = self.matrix()
        if len(matrix) == 0:
            return None
        number = self._number(matrix)
        return None if math.isnan(number) else number

    def _emit_experience(self, strategy: SupervisedTemplate, score: float) -> MetricResult:
        return None

    def after_eval(self, strategy: SupervisedTemplate) -> MetricResult:
        if self._last_stream is None:  # nothing was evaluated
            return None
        number = self.result()
        if number is None:
            return None
        name = get_metric_name(self, strategy, add_task=False)
        return [MetricValue(self, name, number, strategy.clock.train_iterations)]


__all__ = [
    "NumberOfMatrix",
    "ScoreMatrix",
    "backward_transfer",
    "forgetting",
    "overall_performance",
]
