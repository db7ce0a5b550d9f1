"""One run: a method learns a stream of tasks, and leaves a folder of plain files.

config.yaml               first; its keys are flags of `treelora train`
metrics.jsonl             appended: a line per epoch, a line per task
adapters/task_000/ ...    peft folders, one after each task
tree.safetensors, tree.json   TreeLoRA's tree, rewritten after each task
tensorboard/, *_results.csv   Avalanche's own loggers
results.json              last; its presence says that the run is finished
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import yaml
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import (
    MaxRAM,
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    loss_metrics,
)
from avalanche.logging import BaseLogger, CSVLogger, InteractiveLogger, TensorboardLogger
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin
from safetensors.torch import save_file
from torch import Tensor, nn

from . import models, scenarios
from ._version import __version__
from .adapters import save_adapter
from .methods import find_method, method_config
from .metrics import (
    AccuracyMatrix,
    BackwardTransfer,
    EpochAccuracy,
    EpochLoss,
    OverallPerformance,
    backward_transfer,
    forgetting,
    overall_performance,
)
from .names import check_known
from .settings import DIGITS_VIT, RunSettings

SCHEMA_VERSION = 2
VERSIONED = ("torch", "avalanche-lib", "timm", "peft", "transformers", "numpy")


@dataclass(frozen=True)
class Progress:
    """Where a run is, for whoever shows it."""

    task: int
    n_tasks: int
    epoch: int
    n_epochs: int
    step: int
    n_steps: int
    accuracy: float | None
    """ Class-incremental Op after the last finished task. """


ProgressCallback = Callable[[Progress], None]


# --------------------------------------------------------------------------------------------------
# Files


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour that takes the place of `path` when all went well."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    :param path: the file.
    :param text: its new content.
    """
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: an accuracy that was not measured becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value


def to_json(value: Any, indent: int | None = 2) -> str:
    """Strict JSON, with null for numbers that do not exist."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _write_tree(tree: Any, folder: Path) -> None:
    state = tree.to_dict()
    signatures = state.pop("signatures")
    with _replacing(folder / "tree.safetensors") as temporary:
        save_file({"signatures": signatures.detach().cpu().contiguous()}, temporary)
    write_text(folder / "tree.json", to_json(state))


def resolve_config(method: str, seed: int, settings: RunSettings) -> dict[str, Any]:
    """The configuration of a run, with the device and the data folder named.

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: the settings.
    """
    config = method_config(method, seed, settings)
    config["device"] = str(_device(settings.device))
    if settings.data is not None:
        config["data"] = str(Path(settings.data).expanduser().resolve())
    return config


def run_name(config: dict[str, Any]) -> str:
    """A folder name that differs wherever the configuration, or the package's version, does.

    :param config: from :func:`resolve_config`.
    """
    text = json.dumps([__version__, SCHEMA_VERSION, config], sort_keys=True)
    return (
        f"{config['method']}-seed{config['seed']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def finished_results(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The results in a run folder, if they are of exactly this configuration and version.

    :param folder: a run folder, which need not exist.
    :param config: from :func:`resolve_config`.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        same = (
            results["config"] == config
            and results["schema_version"] == SCHEMA_VERSION
            and results["versions"]["treelora-avalanche"] == __version__
        )
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return results if same else None


def _prepare_folder(folder: Path, config: dict[str, Any]) -> None:
    """Empty the folder of an earlier run, and of nothing else; then write `config.yaml`."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output` should be a folder, but {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.yaml").is_file():
        raise ValueError(
            f"`--output` {folder} is not empty and holds no run; choose another folder"
        )
    if (folder / "results.json").is_file() and finished_results(folder, config) is None:
        raise ValueError(f"`--output` {folder} holds another finished run; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    # results.json goes first: a folder that is being rewritten must not look finished.
    for name in ("results.json", "metrics.jsonl", "tree.json", "tree.safetensors", "error.txt"):
        (folder / name).unlink(missing_ok=True)
    for name in ("adapters", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


# --------------------------------------------------------------------------------------------------
# What watches a run


class JsonLinesLogger(BaseLogger):
    """Appends one JSON object per line: epochs as they end, and whatever else is handed over.

    :param path: the file; created if it is not there.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def write(self, **fields: Any) -> None:
        """Append one line.

        :param fields: the line's keys and values.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(fields, indent=None) + "\n")

    def after_training_epoch(self, strategy: Any, metric_values: Any, **kwargs: Any) -> None:
        values = {value.name.split("/")[0]: value.value for value in metric_values}
        self.write(
            event="epoch",
            experience=strategy.experience.current_experience,
            epoch=strategy.clock.train_exp_epochs + 1,
            loss=values.get("Loss_Epoch"),
            training_accuracy=values.get("Top1_Acc_Epoch"),
        )


class ProgressPlugin(SupervisedPlugin):
    """Counts training steps and reports them. It reads nothing from the device.

    :param callback: called after every step.
    :param n_tasks: length of the stream.
    :param n_steps: training steps of the whole stream.
    """

    def __init__(self, callback: ProgressCallback, n_tasks: int, n_steps: int):
        super().__init__()
        self.callback = callback
        self.n_tasks = n_tasks
        self.n_steps = n_steps
        self.accuracy: float | None = None
        self.step = 0
        self.task = 0

    def report(self, strategy: Any) -> None:
        """Report the present state.

        :param strategy: the strategy that trains.
        """
        epoch = min(strategy.clock.train_exp_epochs + 1, strategy.train_epochs)
        self.callback(
            Progress(
                task=self.task,
                n_tasks=self.n_tasks,
                epoch=epoch,
                n_epochs=strategy.train_epochs,
                step=self.step,
                n_steps=self.n_steps,
                accuracy=self.accuracy,
            )
        )

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.task += 1

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.step += 1
        self.report(strategy)


class _Stopwatch:
    """Seconds of work, the device's included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now() - self._start


class _PeakMemory:
    """Largest memory of a run: allocated on a GPU, else the process's as Avalanche reads it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.kind = "cuda allocated" if device.type == "cuda" else "process resident"
        self.bytes = 0
        self._ram = MaxRAM(every=0.1)

    def __enter__(self) -> _PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._ram.start_thread()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._ram.stop_thread()
            self.bytes = int((self._ram.result() or 0) * 2**20)


# --------------------------------------------------------------------------------------------------
# What is counted at the end


_CODE = (type, FunctionType, MethodType, ModuleType)


def _tensors_below(value: Any, visited: set[int], depth: int = 0) -> Iterator[Tensor]:
    """All tensors reachable from a plugin's state."""
    if id(value) in visited or depth > 12:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_below(item, visited, depth + 1)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors_below(item, visited, depth + 1)
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
        yield from _tensors_below(vars(value), visited, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, _CODE):
        yield from _tensors_below(vars(value), visited, depth + 1)


def stored_bytes(strategy: Any) -> int:
    """Bytes of the tensors that a strategy's plugins keep from task to task beyond the model.

    Stored samples count as the tensors that the model sees, though Avalanche keeps references into
    the benchmark's own data. Evaluation, counters and progress do not count.

    :param strategy: an Avalanche strategy between two tasks.
    """

    def storage(tensor: Tensor) -> tuple[int, int]:
        memory = tensor.untyped_storage()
        return memory.data_ptr(), memory.nbytes()

    own = (EvaluationPlugin, ProgressPlugin)
    plugins = [
        plugin
        for plugin in strategy.plugins
        if not isinstance(plugin, own) and plugin is not strategy.clock
    ]
    model = getattr(strategy.model, "module", strategy.model)
    of_model = {storage(t)[0] for t in (*model.parameters(), *model.buffers())}
    passing = ("loss", "mb_output")
    own_tensors = [
        value
        for name, value in vars(strategy).items()
        if isinstance(value, Tensor) and name not in passing
    ]
    kept = {storage(t) for t in _tensors_below([plugins, own_tensors], {id(strategy)})}
    tensors = sum(size for address, size in kept if address not in of_model)
    return tensors + _stored_samples_bytes(strategy)


def _stored_samples_bytes(strategy: Any) -> int:
    """Bytes of the samples in a replay memory, or in a cumulative training set."""
    memories = [getattr(plugin, "storage_policy", None) for plugin in strategy.plugins]
    stores = [memory.buffer for memory in memories if memory is not None]
    if getattr(strategy, "dataset", None) is not None:
        stores.append(strategy.dataset)
    # All samples have the shape of the first.
    return sum(len(store) * store[0][0].nbytes for store in stores if len(store))


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def git_hash() -> str | None:
    """The commit of this package's checkout; None where it was installed otherwise."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout, which does not track it.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


# --------------------------------------------------------------------------------------------------
# The run


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`--device` is {name!r}, which torch does not know") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`--device` is {name!r}, but torch sees no GPU; use cpu")
    return device


@dataclass(frozen=True)
class Ingredients:
    """What all methods share under one seed: the stream and the pretrained backbone."""

    seed: int
    benchmark: Any
    backbone: nn.Module


def _chosen_classes(data: Path, settings: RunSettings) -> list[str] | None:
    """The classes without the excluded ones; None for all."""
    if not settings.exclude_classes:
        return settings.classes
    folder = data / "train" if (data / "train").is_dir() else data
    names = settings.classes or sorted(path.name for path in folder.iterdir() if path.is_dir())
    for name in settings.exclude_classes:
        check_known("class in `--exclude_classes`", name, names)
    return [name for name in names if name not in settings.exclude_classes]


def prepare(seed: int, settings: RunSettings) -> Ingredients:
    """Build the stream and the backbone. This is where wrong data or weights are noticed.

    :param seed: seed of the class order, of the backbone's head and, for digits, of its
        pretraining.
    :param settings: the settings.
    """
    data = None if settings.data is None else Path(settings.data).expanduser()
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"`--data` {data} is not a folder")
    RNGManager.set_random_seeds(seed)
    benchmark: Any
    if settings.model_name == DIGITS_VIT:
        benchmark = scenarios.SplitDigits(settings.n_experiences, seed=seed)
        return Ingredients(seed, benchmark, models.pretrained_digits_vit(seed))
    assert data is not None  # checked by the settings
    # The number of classes comes from the data, whose preprocessing comes from the model.
    unweighted = models.create_vit(
        settings.model_name, num_classes=0, img_size=settings.img_size, pretrained=False
    )
    benchmark = scenarios.SplitImageFolder(
        data,
        settings.n_experiences,
        preprocessing=models.image_preprocessing(unweighted),
        classes=_chosen_classes(data, settings),
        seed=seed,
    )
    backbone = models.create_vit(
        settings.model_name,
        num_classes=benchmark.n_classes,
        checkpoint=settings.checkpoint,
        img_size=settings.img_size,
    )
    return Ingredients(seed, benchmark, backbone)


def run(
    method: str,
    seed: int,
    settings: RunSettings,
    folder: Path | str,
    *,
    ingredients: Ingredients | None = None,
    progress: ProgressCallback | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train a method on its stream, evaluating on the tasks seen so far after every task.

    :param method: name of the method, see :data:`treelora_avalanche.methods.METHODS`.
    :param seed: seeds everything: class order, backbone, initialisation, shuffling, selection.
    :param settings: everything else.
    :param folder: the run folder; an earlier run in it is replaced.
    :param ingredients: from :func:`prepare` with the same seed and settings, to share it among
        methods; built here by default.
    :param progress: called after every training step.
    :param verbose: attach Avalanche's `InteractiveLogger`.
    :return: what `results.json` holds.
    """
    entry = find_method(method)
    config = resolve_config(method, seed, settings)
    device = _device(config["device"])
    if ingredients is None:
        ingredients = prepare(seed, settings)
    elif ingredients.seed != seed:
        raise ValueError(f"`ingredients` were prepared for seed {ingredients.seed}, not {seed}")
    benchmark = ingredients.benchmark
    folder = Path(folder)
    _prepare_folder(folder, config)

    lines = JsonLinesLogger(folder / "metrics.jsonl")
    matrices = {
        "class_incremental": AccuracyMatrix(),
        "within_task": AccuracyMatrix(within_task=True),
    }
    # Trained on all tasks at once, there is no order of tasks to measure.
    continual = [] if entry.joint else [OverallPerformance, BackwardTransfer]
    files = [TensorboardLogger(str(folder / "tensorboard")), CSVLogger(str(folder))]
    evaluator = EvaluationPlugin(
        *matrices.values(),
        *(kind(within_task=w) for w in (False, True) for kind in continual),
        EpochLoss(),
        EpochAccuracy(),
        accuracy_metrics(experience=True, stream=True),
        loss_metrics(experience=True, stream=True),
        forgetting_metrics(experience=True, stream=True),
        bwt_metrics(stream=True),
        loggers=[*files, lines, *([InteractiveLogger()] if verbose else [])],
    )
    samples = [len(experience.dataset) for experience in benchmark.train_stream]
    epochs = entry.epochs(settings)
    stages = _stages(benchmark, joint=entry.joint)
    trained_on = [
        sum(samples[: stage.task + 1]) if entry.on_all_seen else samples[stage.task]
        for stage in stages
    ]
    steps = [math.ceil(n / settings.batch_size) * epochs for n in trained_on]
    counter = ProgressPlugin(progress or (lambda _: None), len(stages), sum(steps))

    # Again, whether or not the ingredients were built here: a cell is the same run alone and in a
    # comparison. The model is copied, since the next method starts from the same one.
    RNGManager.set_random_seeds(seed)
    training, evaluating, memory = _Stopwatch(device), _Stopwatch(device), _PeakMemory(device)
    try:
        with memory:
            strategy = entry.build(
                copy.deepcopy(ingredients.backbone),
                settings,
                config.get("lr", 0.0),
                seed,
                {
                    "train_mb_size": settings.batch_size,
                    "train_epochs": epochs,
                    "eval_mb_size": settings.eval_batch_size,
                    "device": device,
                    "plugins": [counter],
                    "evaluator": evaluator,
                },
            )
            for stage in stages:
                with training:
                    strategy.train(stage.train)
                # Before evaluation: what was learned is safe whatever happens next.
                if entry.uses_lora:
                    (folder / "adapters").mkdir(exist_ok=True)
                    save_adapter(strategy.model, folder / "adapters" / f"task_{stage.task:03}")
                if hasattr(strategy, "tree"):
                    _write_tree(strategy.tree, folder)
                with evaluating:
                    strategy.eval(stage.test)
                accuracy = {kind: _accuracies(m, stage) for kind, m in matrices.items()}
                scores = {kind: _scores(matrix) for kind, matrix in accuracy.items()}
                counter.accuracy = scores["class_incremental"]["overall_performance"]
                counter.report(strategy)
                lines.write(
                    event="task",
                    task=stage.task,
                    experience=benchmark.train_stream[stage.task].current_experience,
                    classes=sorted(benchmark.train_stream[stage.task].classes_in_this_experience),
                    accuracy={kind: m[-1].tolist() for kind, m in accuracy.items()},
                    train_seconds=training.seconds,
                    **scores,
                )
    finally:
        for logger in files:
            close = getattr(logger, "close", None) or logger.writer.close
            close()

    results = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "seed": seed,
        "config": config,
        "epochs": epochs,
        "metrics": scores,
        # Row: after training on the j-th task; column: the i-th task, in the order of training.
        # Null where it was not evaluated: before a task is seen, and, trained on all at once, in
        # every row but the last.
        "accuracy_matrix": {kind: m.tolist() for kind, m in accuracy.items()},
        "stream": {
            "trained": [experience.current_experience for experience in benchmark.train_stream],
            "classes": [sorted(e.classes_in_this_experience) for e in benchmark.train_stream],
            # Avalanche's own benchmarks have no names.
            "class_names": list(getattr(benchmark, "class_names", range(benchmark.n_classes))),
            "train_samples": samples,
            "test_samples": [len(e.dataset) for e in benchmark.test_stream],
        },
        "timings": {
            "train_seconds": training.seconds,
            "ms_per_step": 1000 * training.seconds / counter.step if counter.step else None,
            # Of the stream: samples that a method trains on once more do not count again.
            "samples_per_second": epochs * sum(samples) / training.seconds,
            "eval_seconds": evaluating.seconds,
            "steps": counter.step,
        },
        "memory": {
            "peak_bytes": memory.bytes,
            "peak_kind": memory.kind,
            "stored_bytes": stored_bytes(strategy),
        },
        "parameters": _count_parameters(strategy.model),
        "versions": {
            "python": platform.python_version(),
            "treelora-avalanche": __version__,
            **{package: _version_of(package) for package in VERSIONED},
        },
        "git_hash": git_hash(),
        "hardware": _hardware(device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text(folder / "results.json", to_json(results))
    return _without_nan(results)


@dataclass(frozen=True)
class _Stage:
    """What is trained in one go, and what is evaluated then."""

    task: int
    """ The last task of the stage, counted from 0 in the order of training. """
    train: Any
    test: Any


def _stages(benchmark: Any, *, joint: bool) -> list[_Stage]:
    train, test = benchmark.train_stream, benchmark.test_stream
    n = len(train)
    if joint:
        return [_Stage(n - 1, train, test)]
    # Classes not seen yet have nothing to say.
    return [_Stage(task, train[task], test[: task + 1]) for task in range(n)]


def _accuracies(matrix: AccuracyMatrix, stage: _Stage) -> Tensor:
    """The matrix so far: a row and a column for every task seen, NaN where not evaluated."""
    known = matrix.matrix()
    rows = known.new_full((stage.task + 1, stage.task + 1), math.nan)
    rows[-len(known) :] = known
    return rows


def _scores(accuracies: Tensor) -> dict[str, float]:
    return {
        "overall_performance": overall_performance(accuracies),
        "backward_transfer": backward_transfer(accuracies),
        "forgetting": forgetting(accuracies),
    }


def _count_parameters(model: nn.Module) -> dict[str, int]:
    parameters = list(getattr(model, "module", model).parameters())
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "total": sum(p.numel() for p in parameters),
    }


__all__ = [
    "Ingredients",
    "JsonLinesLogger",
    "Progress",
    "ProgressPlugin",
    "finished_results",
    "git_hash",
    "prepare",
    "resolve_config",
    "run",
    "run_name",
    "stored_bytes",
    "to_json",
    "write_text",
]
