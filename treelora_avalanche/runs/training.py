"""A run from its first task, or from where it was interrupted, to its results."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avalanche.training.determinism.rng_manager import RNGManager

from treelora_avalanche.adapters import save_adapter
from treelora_avalanche.adapters.classifier import check_classes
from treelora_avalanche.checkpoint import load_strategy_state
from treelora_avalanche.metrics.footprint import count_parameters, stored_bytes
from treelora_avalanche.provenance import git_hash, hardware, versions
from treelora_avalanche.registry.methods import Method, find_method
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs.config import find_device, resolve_config
from treelora_avalanche.runs.distributed import parallel_plugins
from treelora_avalanche.runs.folder import (
    SCHEMA_VERSION,
    count_lines,
    first_lines,
    prepare_folder,
    remove_state,
    write_results,
)
from treelora_avalanche.runs.monitors import (
    PeakMemory,
    ProgressCallback,
    ProgressPlugin,
    Stopwatch,
    training_in_words,
)
from treelora_avalanche.runs.record import Record, scores_of
from treelora_avalanche.runs.resume import (
    CannotContinueError,
    Interrupted,
    Progressed,
    find_interrupted,
    has_finished_tasks,
    save_progress,
    why_unsaved,
)
from treelora_avalanche.runs.schedule import (
    Stage,
    count_steps,
    epochs_of_stage,
    epochs_of_tasks,
    weighted_sum,
)
from treelora_avalanche.runs.setup import Ingredients, build_strategy, prepare
from treelora_avalanche.runs.stream_info import describe, task_names
from treelora_avalanche.runs.tree_files import append_drawing, plain_tree, write_tree


def run(
    method: str,
    seed: int,
    settings: RunSettings,
    folder: Path | str,
    *,
    ingredients: Ingredients | None = None,
    progress: ProgressCallback | None = None,
    note: Callable[[str], None] | None = None,
    verbose: bool = False,
    shard_backbone: bool = False,
) -> dict[str, Any]:
    """Train a method on its stream, evaluating on the tasks seen so far after every task.

    A run of the same configuration that was interrupted in the folder continues after the last task
    that it has finished; on the CPU the result is that of an uninterrupted one, bit for bit.

    :param method: name of the method, see :data:`treelora_avalanche.registry.methods.METHODS`.
    :param seed: seeds everything: class order, backbone, initialisation, shuffling, selection.
    :param settings: everything else.
    :param folder: the run folder; an earlier, other run in it is replaced if it is unfinished.
    :param ingredients: from :func:`prepare` with the same seed and settings, to share it among
        methods; built here by default.
    :param progress: called after every training step.
    :param note: called with one line where an interrupted run continues, or cannot. Of a language
        model also with how it is trained, and with TreeLoRA's tree after every task, as in the
        paper's Figures 5 and 8.
    :param verbose: attach Avalanche's `InteractiveLogger`.
    :param shard_backbone: whether the processes of ``torchrun`` divide the frozen weights, see
        :class:`~treelora_avalanche.plugins.DataParallelPlugin`.
    :return: what `results.json` holds.
    """
    entry = find_method(method)
    config = resolve_config(method, seed, settings)
    note = note or (lambda _: None)
    if ingredients is None:
        ingredients = prepare(seed, settings)
    elif ingredients.seed != seed:
        raise ValueError(f"`ingredients` were prepared for seed {ingredients.seed}, not {seed}")
    if not settings.on_language:
        for stream in (ingredients.benchmark.train_stream, ingredients.benchmark.test_stream):
            for experience in stream:
                check_classes(ingredients.backbone, experience)
    folder = Path(folder)

    parallel = parallel_plugins(config["device"], shard_backbone=shard_backbone)

    def attempt(interrupted: Interrupted | None) -> dict[str, Any]:
        return _run(
            entry,
            config,
            settings,
            folder,
            ingredients,
            interrupted,
            progress,
            note,
            verbose,
            parallel,
        )

    try:
        interrupted = find_interrupted(folder, config)
    except (ValueError, OSError) as error:
        note(f"starts again from the first task: {error}")
        return attempt(None)
    if interrupted is not None:
        done = interrupted.progress.stages
        note(f"continues after task {done} of {len(ingredients.benchmark.train_stream)}")
        try:
            return attempt(interrupted)
        except CannotContinueError as error:
            note(f"starts again from the first task: {error}")
    return attempt(None)


def _run(
    entry: Method,
    config: dict[str, Any],
    settings: RunSettings,
    folder: Path,
    ingredients: Ingredients,
    interrupted: Interrupted | None,
    progress: ProgressCallback | None,
    note: Callable[[str], None],
    verbose: bool,
    parallel: list[Any],
) -> dict[str, Any]:
    device = find_device(config["device"])
    benchmark = ingredients.benchmark
    stages = Stage.all_of(benchmark, joint=entry.joint)
    begun = has_finished_tasks(folder, config)
    before = (
        Progressed(stages=0, train_seconds=0, eval_seconds=0, peak_bytes=0, trees=[], lines={})
        if interrupted is None
        else interrupted.progress
    )
    kept = first_lines(folder, before.lines)
    prepare_folder(folder, config, keep=interrupted is not None)
    names = task_names(benchmark)
    record = Record(
        folder, language=settings.on_language, joint=entry.joint, verbose=verbose, kept=kept
    )

    stream = describe(benchmark)
    samples = stream["train_samples"]
    epochs = epochs_of_tasks(entry, settings, len(samples), names)
    steps = count_steps(entry, config, samples, stages, epochs)
    counter = ProgressPlugin(progress or (lambda _: None), len(stages), steps)
    training, evaluating = (
        Stopwatch(device, s) for s in (before.train_seconds, before.eval_seconds)
    )
    memory = PeakMemory(device, before.peak_bytes)
    trees = list(before.trees)

    # Again, whether or not the ingredients were built here: a cell is the same run alone and in a
    # comparison. The model is copied, since the next method starts from the same one.
    RNGManager.set_random_seeds(ingredients.seed)
    try:
        with memory:
            strategy = build_strategy(
                entry,
                settings,
                config,
                ingredients,
                device=device,
                plugins=[*parallel, counter],
                evaluator=record.evaluator,
            )
            if names is not None and not entry.frozen:
                note(training_in_words(strategy, config, epochs))
            unsaved = why_unsaved(strategy)
            if unsaved and begun:
                note(f"starts again from the first task: {unsaved}")
            if interrupted is not None:
                try:
                    past = [stage.train for stage in stages[: before.stages]]
                    load_strategy_state(strategy, interrupted.strategy, past)
                except ValueError as error:
                    raise CannotContinueError(str(error)) from error
            for done, stage in enumerate(stages[before.stages :], start=before.stages + 1):
                if not entry.frozen:
                    strategy.train_epochs = epochs_of_stage(epochs, stage, joint=entry.joint)
                with training:
                    strategy.train(stage.train)
                # Before evaluation: what was learned is safe whatever happens next.
                if entry.uses_lora:
                    (folder / "adapters").mkdir(exist_ok=True)
                    save_adapter(strategy.model, folder / "adapters" / f"task_{stage.task:03}")
                if hasattr(strategy, "tree"):
                    write_tree(strategy.tree, folder)
                    trees.append(plain_tree(strategy.tree))
                    drawing = append_drawing(strategy.tree, stage.task, folder, names)
                    if names is not None:
                        note(f"the tree after {names[stage.task]}\n{drawing.rstrip()}")
                with evaluating:
                    strategy.eval(stage.test)
                record.write_texts(stage)
                accuracy = record.accuracies(stage)
                scores = {kind: scores_of(matrix) for kind, matrix in accuracy.items()}
                counter.accuracy = next(iter(scores.values()))["overall_performance"]
                counter.report(strategy)
                record.lines.write(
                    event="task",
                    task=stage.task,
                    experience=stream["trained"][stage.task],
                    **_what_was_learned(stream, stage.task),
                    accuracy={kind: matrix[-1].tolist() for kind, matrix in accuracy.items()},
                    train_seconds=training.seconds,
                    **scores,
                )
                if stage is not stages[-1] and not unsaved:
                    now = Progressed(
                        stages=done,
                        train_seconds=training.seconds,
                        eval_seconds=evaluating.seconds,
                        peak_bytes=memory.now(),
                        trees=trees,
                        lines=count_lines(folder),
                    )
                    save_progress(folder, strategy, now)
    finally:
        record.close()

    results = {
        "schema_version": SCHEMA_VERSION,
        "method": config["method"],
        "seed": config["seed"],
        "config": config,
        # Of texts one for each task, where they may differ.
        "epochs": epochs if settings.on_language else epochs[0],
        "metrics": scores,
        # Row: after training on the j-th task; column: the i-th task, in the order of training.
        # Null where it was not evaluated: before a task is seen, and, trained on all at once, in
        # every row but the last.
        "accuracy_matrix": {kind: matrix.tolist() for kind, matrix in accuracy.items()},
        "stream": stream,
        "trees": trees or None,
        "timings": {
            "train_seconds": training.seconds,
            "ms_per_step": 1000 * training.seconds / counter.step if counter.step else None,
            # Of the stream: samples that a method trains on once more do not count again.
            "samples_per_second": weighted_sum(epochs, samples) / training.seconds,
            **(
                {
                    "tokens_per_second": weighted_sum(epochs, stream["train_tokens"])
                    / training.seconds
                }
                if settings.on_language
                else {}
            ),
            "eval_seconds": evaluating.seconds,
            "steps": counter.step,
        },
        "memory": {
            "peak_bytes": memory.bytes,
            "peak_kind": memory.kind,
            "stored_bytes": stored_bytes(strategy),
        },
        "parameters": count_parameters(strategy.model, trained=not entry.frozen),
        "versions": versions(),
        "git_hash": git_hash(),
        "hardware": hardware(device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    written = write_results(folder, results)
    remove_state(folder)
    return written


def _what_was_learned(stream: dict[str, Any], task: int) -> dict[str, Any]:
    if "task_names" in stream:
        return {"task_name": stream["task_names"][task]}
    return {"classes": stream["classes"][task]}


__all__ = ["run"]
