"""The accuracy matrix of a stream, and what is read from it.

Let f_i(w_j) be the accuracy on experience i after training on the j-th one. The paper
(TreeLoRA, arXiv 2506.10355) reports, after n experiences,

    Op_n  = (1/n) sum over i <= n of f_i(w_n)
    Bwt_n = (1/n) sum over i <= n of (f_i(w_i) - f_i(w_n))

The functions of this module are that arithmetic on a plain matrix; the classes fill the
matrix while Avalanche evaluates.
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


class AccuracyMatrix(PluginMetric[Tensor]):
    """f_i(w_j): accuracy on every experience after every experience trained.

    The order of training is recorded as it happens, so a shuffled stream is no trouble. A row
    belongs to one trained experience; evaluating again before the next training overwrites
    it, and so does the evaluation after a second training on an experience seen before.
    Evaluations before any training are kept apart, in :attr:`untrained`: Op and Bwt do not know
    them. Streams are kept apart too, since `eval_every` evaluates training streams by default.

    Counts stay on the device: there is one synchronisation per evaluated experience. Task labels
    are not used. As a metric it emits the accuracy of each evaluated experience; the matrix
    itself is read with :meth:`matrix`.
    """

    def __init__(self, within_task: bool = False):
        """
        :param within_task: if True, the prediction is the best output among the classes of the
            evaluated experience (as if its identity were known); if False, among all outputs
            (class-incremental accuracy).
        """
        super().__init__()
        self.within_task = within_task
        self.trained: list[int] = []
        """ Ids of the trained experiences, in the order of their first training. """
        self.untrained: dict[str, dict[int, float]] = {}
        """ Accuracy by stream and experience id before any training, where evaluated. """
        self._rows: dict[str, dict[int, dict[int, float]]] = {}  # stream -> row -> id -> accuracy
        self._last_stream: str | None = None
        self._start_count()

    def _start_count(self) -> None:
        self._correct: Tensor | None = None  # () on the device
        self._total = 0
        self._classes: Tensor | None = None  # (n_classes_in_experience,) on the device

    def matrix(self, stream: str | None = None) -> Tensor:
        """The matrix so far, a fresh tensor.

        :param stream: name of the evaluated stream; by default the one evaluated last.
        :return: accuracies in [0, 1], NaN where not evaluated; row j belongs to the j-th trained
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
        self._start_count()

    def state_dict(self) -> dict[str, Any]:
        """The accuracies and the order of training, as plain values whose keys are strings."""
        return {
            "within_task": self.within_task,
            "trained": list(self.trained),
            "untrained": {
                stream: {str(i): accuracy for i, accuracy in row.items()}
                for stream, row in self.untrained.items()
            },
            "rows": {
                stream: {
                    str(j): {str(i): accuracy for i, accuracy in row.items()}
                    for j, row in rows.items()
                }
                for stream, rows in self._rows.items()
            },
            "last_stream": self._last_stream,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it lacks keys or has unknown ones, or is of the other kind of
            accuracy; the metric is then as it was.
        """
        check_keys(state, self.state_dict(), f"the state of {self}")
        if state["within_task"] != self.within_task:
            raise ValueError(
                f"`within_task` is {state['within_task']} in the state, and {self.within_task} "
                "here; list the metrics in the order in which they were saved."
            )
        untrained = {
            stream: {int(i): accuracy for i, accuracy in row.items()}
            for stream, row in state["untrained"].items()
        }
        rows_of = {
            stream: {
                int(j): {int(i): accuracy for i, accuracy in row.items()} for j, row in rows.items()
            }
            for stream, rows in state["rows"].items()
        }
        self.trained = list(state["trained"])
        self.untrained = untrained
        self._rows = rows_of
        self._last_stream = state["last_stream"]
        self._start_count()

    def before_training_exp(self, strategy: SupervisedTemplate) -> None:
        experience: Any = strategy.experience
        if experience.current_experience not in self.trained:
            self.trained.append(experience.current_experience)

    def before_eval(self, strategy: SupervisedTemplate) -> None:
        self._last_stream = None

    def before_eval_exp(self, strategy: SupervisedTemplate) -> None:
        self._start_count()
        if self.within_task:
            experience: Any = strategy.experience
            self._classes = torch.tensor(
                sorted(experience.classes_in_this_experience), device=strategy.device
            )

    def after_eval_iteration(self, strategy: SupervisedTemplate) -> None:
        super().after_eval_iteration(strategy)
        output: Tensor = strategy.mb_output  # (batch, n_outputs)
        if self._classes is None:
            predicted = output.argmax(dim=1)
        else:
            predicted = self._classes[output.index_select(1, self._classes).argmax(dim=1)]
        correct = (predicted == strategy.mb_y).sum()
        self._correct = correct if self._correct is None else self._correct + correct
        self._total += len(output)

    def after_eval_exp(self, strategy: SupervisedTemplate) -> MetricResult:
        if self._correct is None:  # an experience without samples has no accuracy
            return None
        accuracy = self._correct.item() / self._total
        experience: Any = strategy.experience
        stream = stream_type(experience)
        self._last_stream = stream
        if self.trained:
            row = self._rows.setdefault(stream, {}).setdefault(len(self.trained) - 1, {})
        else:
            row = self.untrained.setdefault(stream, {})
        row[experience.current_experience] = accuracy
        return self._emit_experience(strategy, accuracy)

    def _emit_experience(self, strategy: SupervisedTemplate, accuracy: float) -> MetricResult:
        name = get_metric_name(self, strategy, add_experience=True)
        return [MetricValue(self, name, accuracy, strategy.clock.train_iterations)]

    def __str__(self) -> str:
        return "AccuracyMatrix" + ("_WithinTask" if self.within_task else "")


class _OfMatrix(AccuracyMatrix):
    """A single number of the accuracy matrix, emitted at the end of every evaluation.

    It keeps its own matrix, so that it works alone and in any order beside other metrics.
    """

    _name: str

    def _number(self, matrix: Tensor) -> float:
        raise NotImplementedError

    def result(self) -> float | None:  # type: ignore[override]
        """The number for the stream evaluated last.

        :return: None before any training, or where an accuracy it needs was not evaluated.
        """
        matrix = self.matrix()
        if len(matrix) == 0:
            return None
        number = self._number(matrix)
        return None if math.isnan(number) else number

    def _emit_experience(self, strategy: SupervisedTemplate, accuracy: float) -> MetricResult:
        return None

    def after_eval(self, strategy: SupervisedTemplate) -> MetricResult:
        if self._last_stream is None:  # nothing was evaluated
            return None
        number = self.result()
        if number is None:
            return None
        name = get_metric_name(self, strategy, add_task=False)
        return [MetricValue(self, name, number, strategy.clock.train_iterations)]

    def __str__(self) -> str:
        return self._name + ("_WithinTask" if self.within_task else "")


class OverallPerformance(_OfMatrix):
    """Op_n, the mean accuracy over the experiences seen so far. Higher is better.

    The whole test stream may be evaluated: experiences not trained yet do not count. Nothing is
    emitted when a seen experience is missing from the evaluation. See
    :func:`overall_performance`; for the argument see :class:`AccuracyMatrix`.
    """

    _name = "OverallPerformance"

    def _number(self, matrix: Tensor) -> float:
        return overall_performance(matrix)


class BackwardTransfer(_OfMatrix):
    """Bwt_n of the paper. **Positive is forgetting**: lower is better.

    It is (n-1)/n times Avalanche's `StreamForgetting`, and -(n-1)/n times its `StreamBWT`. It
    needs an evaluation after every experience, of all experiences seen, and emits nothing
    where one is missing. See :func:`backward_transfer`; for the argument see
    :class:`AccuracyMatrix`.
    """

    _name = "BackwardTransfer"

    def _number(self, matrix: Tensor) -> float:
        return backward_transfer(matrix)


def continual_metrics(
    *, class_incremental: bool = True, within_task: bool = True
) -> list[PluginMetric]:
    """The metrics of the paper, for Avalanche's `EvaluationPlugin`.

    :param class_incremental: predictions among all outputs.
    :param within_task: predictions among the classes of the evaluated experience.
    :return: accuracy matrix, overall performance and backward transfer of each chosen kind.
    """
    metrics: list[PluginMetric] = []
    for wanted, within in ((class_incremental, False), (within_task, True)):
        if wanted:
            metrics += [
                AccuracyMatrix(within_task=within),
                OverallPerformance(within_task=within),
                BackwardTransfer(within_task=within),
            ]
    return metrics


__all__ = [
    "AccuracyMatrix",
    "BackwardTransfer",
    "OverallPerformance",
    "backward_transfer",
    "continual_metrics",
    "forgetting",
    "overall_performance",
]
