"""The matrix of scores of a stream, its arithmetic, and the metrics that fill and read it.

Let f_i(w_j) be the score on experience i after training on the j-th one. The paper
(TreeLoRA, arXiv 2506.10355) reports, after n experiences,

    Op_n  = (1/n) sum over i <= n of f_i(w_n)
    Bwt_n = (1/n) sum over i <= n of (f_i(w_i) - f_i(w_n))

The functions of this module are that arithmetic on a plain matrix; the classes keep the matrix
while Avalanche trains and evaluates. What a score is, their subclasses say.
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

from treelora_avalanche.state import check_keys

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate

MatrixLike = Tensor | Sequence[Sequence[float]]


def _seen_square(matrix: MatrixLike) -> Tensor:
    """The n columns of the n experiences trained so far, checked. # (n, n)"""
    square = torch.as_tensor(matrix, dtype=torch.float64)
    if square.ndim != 2 or square.shape[0] == 0 or square.shape[1] < square.shape[0]:
        raise ValueError(
            "`matrix` should have one row per trained experience and at least as many columns, "
            f"but its shape is {tuple(square.shape)}"
        )
    return square[:, : square.shape[0]]


def overall_performance(matrix: MatrixLike) -> float:
    """Op_n, the mean over the experiences i <= n of f_i(w_n).

    Every experience weighs the same, unlike in Avalanche's `Top1_Acc_Stream`, which is a
    mean over samples, unseen experiences included.

    :param matrix: f_i(w_j) at row j, column i; experiences in the order of training. Columns
        beyond the number of rows (experiences not trained yet) are ignored.
    :return: the mean of the last row over the experiences seen; NaN if one was not evaluated.
    """
    return _seen_square(matrix)[-1].mean().item()


def _total_drop(matrix: MatrixLike) -> tuple[float, int]:
    """The sum over i <= n of f_i(w_i) - f_i(w_n), and n. The i = n term is 0."""
    square = _seen_square(matrix)
    return (square.diagonal() - square[-1]).sum().item(), len(square)


def backward_transfer(matrix: MatrixLike) -> float:
    """Bwt_n of the paper. **Positive is forgetting**, so lower is better.

    Relation to Avalanche, whose averages leave out the experience trained last:
    Bwt_n = (n-1)/n x `StreamForgetting` = -(n-1)/n x `StreamBWT`.

    :param matrix: f_i(w_j) at row j, column i; experiences in the order of training.
    :return: the mean over i <= n of f_i(w_i) - f_i(w_n), whose i = n term is 0; NaN if one of
        these was not evaluated.
    """
    drop, n = _total_drop(matrix)
    return drop / n


def forgetting(matrix: MatrixLike) -> float:
    """Avalanche's `StreamForgetting`: the mean drop of the experiences before the last.

    :param matrix: f_i(w_j) at row j, column i; experiences in the order of training.
    :return: the mean over i < n of f_i(w_i) - f_i(w_n); 0 for a single experience, as there is
        nothing yet to forget.
    """
    drop, n = _total_drop(matrix)
    return drop / (n - 1) if n > 1 else 0.0


class ScoreMatrix(PluginMetric[Tensor]):
    """f_i(w_j): the score on every experience after every experience trained.

    The order of training is recorded as it happens, so a shuffled stream is no trouble. A row
    belongs to one trained experience; evaluating again before the next training overwrites
    it, and so does the evaluation after a second training on an experience seen before.
    Evaluations before any training are kept apart, in :attr:`untrained`: Op and Bwt do not know
    them. Streams are kept apart too, since `eval_every` evaluates training streams by default.

    A subclass hands each score to :meth:`record`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[int] = []
        """ Ids of the trained experiences, in the order of their first training. """
        self.untrained: dict[str, dict[int, float]] = {}
        """ Score by stream and experience id before any training, where evaluated. """
        self._rows: dict[str, dict[int, dict[int, float]]] = {}  # stream -> row -> id -> score
        self._last_stream: str | None = None

    def matrix(self, stream: str | None = None) -> Tensor:
        """The matrix so far, a fresh tensor.

        :param stream: name of the evaluated stream; by default the one evaluated last.
        :return: scores in [0, 1], NaN where not evaluated; row j belongs to the j-th trained
            experience, column i to the i-th. Experiences evaluated but not trained yet follow as
            further columns, by their id. # (n_trained, n_trained + n_unseen)
        """
        rows = self._rows.get(stream or self._last_stream or "", {})
        unseen = sorted({i for row in rows.values() for i in row} - set(self.trained))
        columns = self.trained + unseen
        return torch.tensor(
            [[rows.get(j, {}).get(i, math.nan) for i in columns] for j in range(len(self.trained))],
            dtype=torch.float64,
        ).reshape(len(self.trained), len(columns))

    def result(self) -> Tensor:
        """The matrix of the stream evaluated last. See :meth:`matrix`."""
        return self.matrix()

    def reset(self) -> None:
        """Forget every evaluation and the order of training."""
        self.trained = []
        self.untrained = {}
        self._rows = {}
        self._last_stream = None

    def state_dict(self) -> dict[str, Any]:
        """The scores and the order of training, as plain values whose keys are strings."""
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
        """Continue from a state.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it lacks keys or has unknown ones; the metric is then as it was.
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
        experience: Any = strategy.experience
        if experience.current_experience not in self.trained:
            self.trained.append(experience.current_experience)

    def before_eval(self, strategy: SupervisedTemplate) -> None:
        self._last_stream = None

    def record(self, strategy: SupervisedTemplate, score: float) -> MetricResult:
        """Enter the score of the experience under evaluation, and emit it.

        :param strategy: the strategy that evaluates.
        :param score: the score, in [0, 1].
        :return: what the metric emits for an experience.
        """
        experience: Any = strategy.experience
        stream = stream_type(experience)
        self._last_stream = stream
        if self.trained:
            row = self._rows.setdefault(stream, {}).setdefault(len(self.trained) - 1, {})
        else:
            row = self.untrained.setdefault(stream, {})
        row[experience.current_experience] = score
        return self._emit_experience(strategy, score)

    def _emit_experience(self, strategy: SupervisedTemplate, score: float) -> MetricResult:
        name = get_metric_name(self, strategy, add_experience=True)
        return [MetricValue(self, name, score, strategy.clock.train_iterations)]


class NumberOfMatrix(ScoreMatrix):
    """A single number of the matrix, emitted at the end of every evaluation.

    It keeps its own matrix, so that it works alone and in any order beside other metrics.
    """

    def _number(self, matrix: Tensor) -> float:
        raise NotImplementedError

    def result(self) -> float | None:  # type: ignore[override]
        """The number for the stream evaluated last.

        :return: None before any training, or where a score it needs was not evaluated.
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
