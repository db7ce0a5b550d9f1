"""Metrics of a run, and the files that grow with it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from avalanche.evaluation.metrics import (
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    loss_metrics,
)
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor

from treelora_avalanche.metrics import (
    AccuracyMatrix,
    BackwardTransfer,
    EpochAccuracy,
    EpochLoss,
    GenerationScore,
    OverallPerformance,
    backward_transfer,
    forgetting,
    generation_metrics,
    overall_performance,
)
from treelora_avalanche.runs.distributed import is_first
from treelora_avalanche.runs.folder import to_json, write_text
from treelora_avalanche.runs.monitors import JsonLinesLogger
from treelora_avalanche.runs.schedule import Stage

BASE_MODEL = "base model"
"""In counts of routes: the model without an adapter."""


class Record:
    """Metrics of a run, and the files that grow with it.

    Streams of classes have two kinds of accuracy matrices: ``class_incremental``, among all
    classes, and ``within_task``, among those of the task. Language models have one, ``generated``,
    of scores of generated texts. Methods are ranked by the first. Example::

        record = Record(folder, language=False, joint=False, verbose=False, kept={})
        strategy = SeqLoRA(model, evaluator=record.evaluator)

    :param folder: the run folder.
    :param language: whether a language model is trained.
    :param joint: whether all tasks are trained together, so that their order has no meaning.
    :param verbose: whether to attach Avalanche's ``InteractiveLogger``.
    :param kept: content of the growing files, of a resumed run.
    """

    def __init__(
        self, folder: Path, *, language: bool, joint: bool, verbose: bool, kept: dict[str, str]
    ):
        self.folder = folder
        for name, text in kept.items():
            write_text(folder / name, text)
        self.lines = JsonLinesLogger(folder / "metrics.jsonl")
        metrics = self._text_metrics() if language else self._class_metrics(joint)
        # Avalanche allows loggers in the first process only.
        self._files = self._loggers(kept) if is_first() else []
        self.evaluator = EvaluationPlugin(
            *self.matrices.values(),
            *metrics,
            EpochLoss(),
            loss_metrics(experience=True, stream=True),
            loggers=[
                *self._files,
                *([self.lines] if is_first() else []),
                *([InteractiveLogger()] if verbose and is_first() else []),
            ],
        )

    def _loggers(self, kept: dict[str, str]) -> list[Any]:
        csv = CSVLogger(str(self.folder))
        for file in (csv.training_file, csv.eval_file):
            # Avalanche truncates these files.
            file.write("".join(kept.get(Path(file.name).name, "").splitlines(True)[1:]))
            file.flush()
        return [TensorboardLogger(str(self.folder / "tensorboard")), csv]

    def _class_metrics(self, joint: bool) -> list[Any]:
        self.matrices: dict[str, Any] = {
            "class_incremental": AccuracyMatrix(),
            "within_task": AccuracyMatrix(within_task=True),
        }
        continual = [] if joint else [OverallPerformance, BackwardTransfer]
        return [
            *(metric(within_task=w) for w in (False, True) for metric in continual),
            EpochAccuracy(),
            accuracy_metrics(experience=True, stream=True),
            forgetting_metrics(experience=True, stream=True),
            bwt_metrics(stream=True),
        ]

    def _text_metrics(self) -> list[Any]:
        score, *others = generation_metrics()
        self.matrices = {"generated": score}
        return others

    def write_texts(self, stage: Stage) -> None:
        """Appends the texts that a language model generated in the last evaluation.

        :param stage: the stage that was evaluated.
        """
        score = self.matrices.get("generated")
        if not isinstance(score, GenerationScore):
            return
        with (self.folder / "generated.jsonl").open("a", encoding="utf-8") as file:
            for task, samples in score.generated.items():
                routes = score.generation.routes.get(task)
                for i, (prompt, answer, generated) in enumerate(samples):
                    line = {"after_task": stage.task, "task": task, "prompt": prompt}
                    line.update(answer=answer, generated=generated)
                    if routes:
                        line["route"] = routes[i]._asdict()
                    file.write(to_json(line, indent=None) + "\n")

    def routes(self) -> dict[str, dict[str, int]] | None:
        """Returns how many prompts of each task were given which adapter in the last evaluation.

        :return: by task, counts by the name of the task whose adapter was used, or
            :data:`BASE_MODEL`; None if nothing was routed.
        """
        score = self.matrices.get("generated")
        if not isinstance(score, GenerationScore) or not score.generation.routes:
            return None
        return {
            task: dict(Counter(route.task_name or BASE_MODEL for route in routes))
            for task, routes in score.generation.routes.items()
        }

    def accuracies(self, stage: Stage) -> dict[str, Tensor]:
        """Returns the accuracy matrices so far, ``(n_seen, n_seen)``; NaN where not evaluated.

        :param stage: the stage that was evaluated last.
        """
        matrices = {}
        for kind, metric in self.matrices.items():
            known = metric.matrix()
            rows = known.new_full((stage.task + 1, stage.task + 1), math.nan)
            rows[-len(known) :] = known
            matrices[kind] = rows
        return matrices

    def close(self) -> None:
        """Closes the files."""
        for logger in self._files:
            logger.close() if isinstance(logger, CSVLogger) else logger.writer.close()


def scores_of(accuracies: Tensor) -> dict[str, float]:
    """Returns overall performance, backward transfer and forgetting; NaN where undefined.

    :param accuracies: accuracy on task i (column) after task j (row), ``(n_tasks, n_tasks)``.
    """
    return {
        "overall_performance": overall_performance(accuracies),
        "backward_transfer": backward_transfer(accuracies),
        "forgetting": forgetting(accuracies),
    }


__all__ = ["Record", "scores_of"]
