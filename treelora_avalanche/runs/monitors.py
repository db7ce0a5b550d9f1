"""Monitors of a run: progress, metrics as JSON lines, time and memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import MaxRAM
from avalanche.logging import BaseLogger
from torch import nn

from treelora_avalanche.adapters import lora_layers
from treelora_avalanche.runs.distributed import is_first
from treelora_avalanche.runs.folder import to_json
from treelora_avalanche.tree import MAX_DEPTH


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    >>> run("SeqLoRA", 0, settings, folder, progress=lambda now: print(now.step, now.n_steps))

    :param task: number of the present task, from 1.
    :param n_tasks: length of the stream.
    :param epoch: number of the present epoch of the task, from 1.
    :param n_epochs: epochs of the task.
    :param step: training steps so far.
    :param n_steps: training steps of the whole stream.
    :param accuracy: Op after the last finished task, class-incremental or of generated texts; None
        before the first.
    """

    task: int
    n_tasks: int
    epoch: int
    n_epochs: int
    step: int
    n_steps: int
    accuracy: float | None


ProgressCallback = Callable[[Progress], None]


class JsonLinesLogger(BaseLogger):
    """Logger that appends one JSON object per line: one per epoch, and those of :meth:`write`.

    >>> JsonLinesLogger(Path("metrics.jsonl")).write(event="task", task=0)

    :param path: the file; created if it is missing.
    """

    def __init__(self, path: Path):
        if is_first():  # Avalanche allows loggers in the first process only
            super().__init__()
        self.path = path

    def write(self, **fields: Any) -> None:
        """Appends a line.

        :param fields: the line's keys and values.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(fields, indent=None) + "\n")

    def after_training_epoch(self, strategy: Any, metric_values: Any, **kwargs: Any) -> None:
        values = {value.name.split("/")[0]: value.value for value in metric_values}
        names = {"Loss_Epoch": "loss", "Top1_Acc_Epoch": "training_accuracy"}
        self.write(
            event="epoch",
            experience=strategy.experience.current_experience,
            epoch=strategy.clock.train_exp_epochs + 1,
            **{key: values[name] for name, key in names.items() if name in values},
        )


class ProgressPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Counts training steps and reports them, without synchronising with the device.

    >>> Naive(model=model, optimizer=optimizer, plugins=[ProgressPlugin(print, 3, 24)])

    :param callback: called with a :class:`Progress` after every step.
    :param n_tasks: length of the stream.
    :param n_steps: training steps of the whole stream.
    """

    is_stored = False  # see `metrics.footprint.stored_bytes`

    def __init__(self, callback: ProgressCallback, n_tasks: int, n_steps: int):
        super().__init__()
        self.callback = callback
        self.n_tasks = n_tasks
        self.n_steps = n_steps
        self.accuracy: float | None = None
        self.step = 0
        self.task = 0

    def report(self, strategy: Any) -> None:
        """Calls the callback with the present progress.

        :param strategy: the strategy.
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

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters."""
        return {"step": self.step, "task": self.task, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counters.

        :param state: from :meth:`state_dict`.
        """
        self.step, self.task = state["step"], state["task"]
        self.accuracy = state["accuracy"]

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.task += 1

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.step += 1
        self.report(strategy)


class Stopwatch:
    """Context manager that sums wall-clock seconds, synchronised with the device.

    >>> training = Stopwatch(torch.device("cpu"))
    >>> with training:
    ...     strategy.train(experience)

    :param device: device of the work.
    :param seconds: seconds before, of a resumed run.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device = device
        self.seconds = seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now() - self._start


class PeakMemory:
    """Context manager that measures the peak memory of one run, though others ran before it.

    On a GPU, memory allocated by torch. Else resident memory of the process, which includes Python
    and its libraries: on Linux the kernel's own peak (``VmHWM``), which is reset at the start;
    elsewhere the largest of Avalanche's samples (``MaxRAM``). Memory that earlier runs no longer
    use is freed first.

    >>> with PeakMemory(torch.device("cpu")) as memory:
    ...     strategy.train(experience)
    >>> memory.bytes

    :param device: device of the model.
    :param before: the peak before, of a resumed run.
    """

    def __init__(self, device: torch.device, before: int = 0):
        self.device = device
        self.kind = "cuda allocated" if device.type == "cuda" else "process resident"
        self.bytes = before
        self._sampled: MaxRAM | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()  # strategies and their plugins refer to each other
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif not _reset_resident_peak():
            self._sampled = MaxRAM(every=0.1)
            self._sampled.start_thread()
        return self

    def __exit__(self, *error: object) -> None:
        if self._sampled is not None:
            self._sampled.stop_thread()
        self.bytes = self.now()

    def now(self) -> int:
        """Returns the peak so far."""
        if self.device.type == "cuda":
            return max(self.bytes, torch.cuda.max_memory_allocated(self.device))
        if self._sampled is not None:
            return max(self.bytes, int((self._sampled.result() or 0) * 2**20))
        return max(self.bytes, _resident_peak())


def _reset_resident_peak() -> bool:
    """Frees unused memory, and sets the kernel's peak to the present; False if it cannot be set."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, for the next allocation
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident_peak() > 0
    except (OSError, StopIteration):
        return False


def _resident_peak() -> int:
    """Returns the largest resident memory of the process since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def training_in_words(strategy: Any, config: dict[str, Any], epochs: list[int]) -> str:
    """Returns one line on how a language model is trained, with defaults filled in.

    :param strategy: the strategy, before its first task.
    :param config: the configuration of the run.
    :param epochs: epochs of each task.
    """
    layers = lora_layers(strategy.model)
    words = [
        f"LoRA of rank {config['rank']} (α {config['alpha']:g}) on {len(layers)} matrices"
        if layers
        else _trained_without_lora(strategy.model, of_layers="layers" in config),
        f"learning rate {config['lr']:g}",
        f"batches of {config['batch_size']}",
        f"epochs {', '.join(map(str, epochs))}",
    ]
    if "tree_lambda" in config:
        depth = config["depth"] or min(len(layers), MAX_DEPTH)
        words.append(f"λ {strategy.tree_lambda:g}, a tree of depth {depth}")
        words.append(f"predictions {strategy.inference}")
    return "trains " + "; ".join(words)


def _trained_without_lora(model: nn.Module, of_layers: bool) -> str:
    # Not `model.parameters()`: a `TrainableView` overrides it to yield the trainable ones only.
    parameters = [parameter for _, parameter in nn.Module.named_parameters(model)]
    if all(parameter.requires_grad for parameter in parameters):
        return "every weight"
    n_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    what = "weights" if of_layers else "values of prompts and keys"
    return f"{n_trained:,} {what}" if n_trained else "nothing"


__all__ = [
    "JsonLinesLogger",
    "PeakMemory",
    "Progress",
    "ProgressPlugin",
    "Stopwatch",
    "training_in_words",
]
