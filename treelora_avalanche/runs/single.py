"""One run: new, resumed, or restarted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from treelora_avalanche.adapters.classifier import check_classes
from treelora_avalanche.registry.methods import check_models
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs.config import resolve_config
from treelora_avalanche.runs.distributed import parallel_plugins
from treelora_avalanche.runs.folder import check_folder
from treelora_avalanche.runs.monitors import ProgressCallback
from treelora_avalanche.runs.resume import CannotContinueError, find_interrupted
from treelora_avalanche.runs.session import Job
from treelora_avalanche.runs.setup import Ingredients, prepare
from treelora_avalanche.runs.training import train_stream


def run(
    method: str,
    seed: int,
    settings: RunSettings,
    folder: Path | str,
    *,
    ingredients: Ingredients | None = None,
    known: dict[Path, str] | None = None,
    progress: ProgressCallback | None = None,
    note: Callable[[str], None] | None = None,
    verbose: bool = False,
    shard_backbone: bool = False,
) -> dict[str, Any]:
    """Trains a method on its stream, and evaluates it on the tasks seen so far after every task.

    An interrupted run of the same configuration in the folder is resumed after its last finished
    task; on the CPU the result equals that of an uninterrupted run, bit for bit. Example::

        results = run("TreeLoRA", 0, RunSettings(epochs=2), "runs/first")

    :param method: name of the method, see :data:`treelora_avalanche.registry.METHODS`.
    :param seed: seed of class order, backbone, initialisation, shuffling and selection.
    :param settings: the settings.
    :param folder: the run folder; an unfinished run of another configuration is replaced.
    :param ingredients: stream and backbone from :func:`prepare`, with the same seed and settings;
        built here by default.
    :param known: fingerprints of files that other runs share, by path, if ``ingredients`` are built
        here; see :class:`Ingredients`.
    :param progress: called after every training step.
    :param note: called with messages: whether an interrupted run is resumed; for language models
        also how they are trained, and TreeLoRA's tree after every task, as in the paper's Figures
        5 and 8.
    :param verbose: whether to attach Avalanche's ``InteractiveLogger``.
    :param shard_backbone: whether to shard the frozen weights over the processes of ``torchrun``,
        see :class:`~treelora_avalanche.plugins.DataParallelPlugin`.
    :return: the content of ``results.json``.
    :raises ValueError: if an argument is out of range, the method is not defined for the kind of
        model, or the folder holds another finished run.
    """
    note = note or (lambda _: None)
    check_models([method], settings)
    config = resolve_config(method, seed, settings)
    check_folder(Path(folder), config)
    parallel = parallel_plugins(config["device"], shard_backbone=shard_backbone)
    if ingredients is None:
        shared = {} if known is None else known
        ingredients = replace(prepare(seed, settings, [method]), known=shared)
    elif ingredients.seed != seed:
        raise ValueError(
            f"`ingredients` should be prepared for seed {seed}, but are for seed "
            f"{ingredients.seed}. Call `prepare({seed}, settings)`."
        )
    benchmark = ingredients.benchmark
    if not settings.on_language:
        for experience in (*benchmark.train_stream, *benchmark.test_stream):
            check_classes(ingredients.backbone, experience)
    job = Job(
        config=config,
        settings=settings,
        folder=Path(folder),
        ingredients=ingredients,
        parallel=parallel,
        progress=progress or (lambda _: None),
        note=note,
        verbose=verbose,
    )
    try:
        interrupted = find_interrupted(job.folder, config)
        if interrupted is not None:
            note(f"continues after task {interrupted.progress.stages} of {job.n_tasks}")
            return train_stream(job, interrupted)
    except CannotContinueError as error:
        note(f"starts again from the first task: {error}")
    return train_stream(job)


__all__ = ["run"]
