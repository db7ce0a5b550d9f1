"""A run while it trains: its strategy, what it measures and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche.training.determinism.rng_manager import RNGManager

from treelora_avalanche.adapters import save_adapter
from treelora_avalanche.checkpoint import load_strategy_state, prediction_state
from treelora_avalanche.metrics.footprint import count_parameters
from treelora_avalanche.registry.methods import METHODS
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs.config import find_device, of_method
from treelora_avalanche.runs.folder import (
    MODEL,
    count_lines,
    first_lines,
    prepare_folder,
)
from treelora_avalanche.runs.monitors import (
    PeakMemory,
    ProgressCallback,
    ProgressPlugin,
    Stopwatch,
    training_in_words,
)
from treelora_avalanche.runs.plain_text import PlainText, base_perplexity, in_words
from treelora_avalanche.runs.record import Record, scores_of
from treelora_avalanche.runs.resume import (
    CannotContinueError,
    Interrupted,
    Progressed,
    has_finished_tasks,
    save_progress,
    why_unsaved,
)
from treelora_avalanche.runs.schedule import Schedule, Stage
from treelora_avalanche.runs.setup import Ingredients, build_strategy
from treelora_avalanche.runs.stream_info import describe, learned_in, task_names
from treelora_avalanche.runs.tree_files import append_drawing, plain_tree, write_tree
from treelora_avalanche.state import save_state


@dataclass(frozen=True)
class Job:
    """Arguments of one run.

    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    :param settings: the settings of all methods.
    :param folder: the run folder.
    :param ingredients: the stream and the backbone.
    :param parallel: plugins of data-parallel training.
    :param progress: called after every training step.
    :param note: called with messages for the user.
    :param verbose: whether to attach Avalanche's ``InteractiveLogger``.
    """

    config: dict[str, Any]
    settings: RunSettings
    folder: Path
    ingredients: Ingredients
    parallel: list[Any]
    progress: ProgressCallback
    note: Callable[[str], None]
    verbose: bool

    @property
    def n_tasks(self) -> int:
        """Number of tasks in the stream."""
        return len(self.ingredients.benchmark.train_stream)


class Session:
    """One run in progress: its strategy, its measurements and its files.

    :param job: the run.
    :param before: progress before an interruption.
    """

    strategy: Any
    accuracy: dict[str, Any]
    scores: dict[str, dict[str, float]]
    routes: dict[str, dict[str, int]] | None
    plain_text: dict[str, Any] | None = None

    def __init__(self, job: Job, before: Progressed):
        self.job = job
        self.method = METHODS[job.config["method"]]
        self.settings, _ = of_method(job.config["method"], job.settings)
        self.device = find_device(job.config["device"])
        benchmark = job.ingredients.benchmark
        self.schedule = Schedule.plan(self.method, self.settings, benchmark)
        self.names = task_names(benchmark)
        self.stream = describe(benchmark)
        self.before = before
        self.begun = has_finished_tasks(job.folder, job.config)
        kept = first_lines(job.folder, before.lines)
        prepare_folder(job.folder, job.config, keep=before.stages > 0)
        self.record = Record(
            job.folder,
            language=self.settings.on_language,
            joint=self.method.joint,
            verbose=job.verbose,
            kept=kept,
        )
        self.counter = ProgressPlugin(
            job.progress, len(self.schedule.stages), self.schedule.n_steps
        )
        self.training = Stopwatch(self.device, before.train_seconds)
        self.evaluating = Stopwatch(self.device, before.eval_seconds)
        self.memory = PeakMemory(self.device, before.peak_bytes)
        self.trees = list(before.trees)

    @property
    def remaining(self) -> list[Stage]:
        """Unfinished stages."""
        return self.schedule.stages[self.before.stages :]

    def build(self) -> None:
        """Builds the strategy on a copy of the backbone.

        Random generators are seeded here, whether or not the ingredients were shared: a run is the
        same alone and in a comparison.
        """
        job = self.job
        RNGManager.set_random_seeds(job.ingredients.seed)
        self.strategy = build_strategy(
            job.config["method"],
            job.settings,
            job.ingredients,
            device=self.device,
            plugins=[*job.parallel, self.counter],
            evaluator=self.record.evaluator,
        )
        if self.names is not None and not self.method.frozen:
            job.note(training_in_words(self.strategy, job.config, self.schedule.epochs))
        self.unsaved = why_unsaved(self.strategy)
        if self.unsaved and self.begun:
            job.note(f"starts again from the first task: {self.unsaved}")

    def measure_base(self) -> Callable[[], None]:
        """Measures the perplexity of the base model on plain text.

        :return: a function that measures that of the final model, and sets :attr:`plain_text`; it
            does nothing for image models, and for weights that are sharded over processes.
        """
        sharded = any(getattr(plugin, "shard_backbone", False) for plugin in self.job.parallel)
        if not self.settings.on_language or sharded:
            return lambda: None
        ingredients = self.job.ingredients
        text = PlainText.of(ingredients.backbone, self.settings, self.device)
        before = base_perplexity(text, ingredients)

        def measure_final() -> None:
            self.plain_text = text.change(before, text.of_model(self.strategy.model))
            self.job.note(in_words(self.plain_text))

        return measure_final

    def load(self, interrupted: Interrupted) -> None:
        """Loads the strategy's state.

        :param interrupted: the state of the interrupted run.
        :raises CannotContinueError: if the state does not fit.
        """
        past = [stage.train for stage in self.schedule.stages[: self.before.stages]]
        try:
            load_strategy_state(self.strategy, interrupted.strategy, past)
        except ValueError as error:
            raise CannotContinueError(str(error)) from error

    def train(self, stage: Stage) -> None:
        """Trains a stage, and saves its adapter and tree.

        :param stage: the stage.
        """
        if not self.method.frozen:
            self.strategy.train_epochs = stage.epochs
        with self.training:
            self.strategy.train(stage.train)
        # Saved before evaluation, which may fail.
        folder = self.job.folder
        if self.method.uses_lora:
            (folder / "adapters").mkdir(exist_ok=True)
            save_adapter(self.strategy.model, folder / "adapters" / f"task_{stage.task:03}")
        if hasattr(self.strategy, "tree"):
            write_tree(self.strategy.tree, folder)
            self.trees.append(plain_tree(self.strategy.tree))
            drawing = append_drawing(self.strategy.tree, stage.task, folder, self.names)
            if self.names is not None:
                self.job.note(f"the tree after {self.names[stage.task]}\n{drawing.rstrip()}")

    def evaluate(self, stage: Stage) -> None:
        """Evaluates the tasks seen so far, and appends a line of metrics.

        :param stage: the stage that was trained last.
        """
        with self.evaluating:
            self.strategy.eval(stage.test)
        self.record.write_texts(stage)
        self.routes = self.record.routes()
        self.accuracy = self.record.accuracies(stage)
        self.scores = {kind: scores_of(matrix) for kind, matrix in self.accuracy.items()}
        self.counter.accuracy = next(iter(self.scores.values()))["overall_performance"]
        self.counter.report(self.strategy)
        self.record.lines.write(
            event="task",
            task=stage.task,
            experience=self.stream["trained"][stage.task],
            **learned_in(self.stream, stage.task),
            accuracy={kind: matrix[-1].tolist() for kind, matrix in self.accuracy.items()},
            train_seconds=self.training.seconds,
            **self.scores,
        )

    def save(self, stage: Stage) -> None:
        """Saves the state that the run resumes from if it is interrupted.

        :param stage: the stage that was evaluated last.
        """
        stages = self.schedule.stages
        if stage is stages[-1] or self.unsaved:
            return
        now = Progressed(
            stages=stages.index(stage) + 1,
            train_seconds=self.training.seconds,
            eval_seconds=self.evaluating.seconds,
            peak_bytes=self.memory.now(),
            trees=self.trees,
            lines=count_lines(self.job.folder),
        )
        save_progress(self.job.folder, self.strategy, now)

    def save_model(self) -> None:
        """Saves what the predictions of a language run need beyond the pretrained weights.

        Not so where every weight was trained, which would be a copy of the model in every run.
        """
        numbers = count_parameters(self.strategy.model)
        if (
            self.settings.on_language
            and not self.unsaved
            and numbers["trainable"] < numbers["total"]
        ):
            save_state(self.job.folder / MODEL, prediction_state(self.strategy))


__all__ = ["Job", "Session"]
