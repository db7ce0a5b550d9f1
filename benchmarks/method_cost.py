"""What every method costs: time per step, memory, and how both grow with the past tasks.

The TreeLoRA paper's Table 8 and Figure 4(b), measured. All methods train the same layers of the
same ViT, with random weights, on the same random images (speed does not depend on what they show),
two classes a task. Task after task the methods take turns, so that a slow spell of the machine hits
all of them; compared are medians of steps, as ratios to SeqLoRA's at the same task.

* ``ms/step at n``: a training step with n past tasks, and over it SeqLoRA's;
* ``rest``: seconds of a task outside of its steps (statistics, heads, decompositions) with 10 past
  tasks;
* ``peak``: memory that the training of a task allocates at most, beyond the model and what is
  stored, as torch's profiler counts it (on a GPU: as its allocator does);
* ``stored/task``: bytes kept of each past task, between the 5th and the 10th; images as the model
  gets them.

    python benchmarks/method_cost.py --check
    python benchmarks/method_cost.py --model vit_base_patch16_224 --img_size 224 --batch_size 192 \\
        --device cuda --dtype bfloat16
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from _command import run
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
from avalanche.training.plugins import EvaluationPlugin
from rich.console import Console
from rich.table import Table
from step_overhead import StepTimes
from torch.profiler import ProfilerActivity, profile

from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.registry import METHODS, RunSettings
from treelora_avalanche.reports.table import short_bytes
from treelora_avalanche.runs.setup import Ingredients, build_strategy

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log

PAST = (1, 5, 10)
CLASSES_PER_TASK = 2
# Nothing is done against forgetting in these, or they are no method for a stream.
PLAIN = ("SeqLoRA", "Naive", "Cumulative", "JointTraining")
TOLERANCE = 1.05  # equal steps differ by up to this on a busy machine


@dataclass
class Cost:
    """One method while it is measured."""

    strategy: Any
    watch: StepTimes
    ms: dict[int, float] = field(default_factory=dict)
    ratio: dict[int, float] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    rest: float = 0.0
    peak: int = 0


def stream(n_tasks: int, per_task: int, img_size: int) -> Any:
    """Tasks of random images."""
    n_classes = n_tasks * CLASSES_PER_TASK
    images = torch.randn(n_tasks * per_task, 3, img_size, img_size)
    targets = torch.arange(n_tasks * per_task) % n_classes
    data = _make_taskaware_tensor_classification_dataset(images, targets, task_labels=0)
    return nc_benchmark(data, data, n_experiences=n_tasks, task_labels=False).train_stream


def vision_methods() -> list[str]:
    """Methods that are trained task by task on images, SeqLoRA first."""
    trained = [
        name
        for name, entry in METHODS.items()
        if "vision" in entry.models and not entry.frozen and not entry.on_all_seen
    ]
    return ["SeqLoRA", *(name for name in trained if name != "SeqLoRA")]


def method_cost(
    model: str = "deit_tiny_patch16_224",
    img_size: int = 64,
    batch_size: int = 16,
    methods: tuple[str, ...] | None = None,
    steps: int = 2,
    epochs: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[str]:
    """Compares the cost of methods.

    :param model: name of a timm ViT; its weights are random.
    :param img_size: pixels on a side.
    :param batch_size: images per step.
    :param methods: names of methods; by default all that train task by task on images.
    :param steps: steps per epoch.
    :param epochs: epochs of the tasks that are measured; the first is not counted.
    :param device: where to train.
    :param dtype: of the model and the images, such as bfloat16.
    :return: the missed targets.
    """
    warnings.simplefilter("ignore")
    warnings.showwarning = lambda *_, **__: None  # Avalanche sets filters of its own
    names = ["SeqLoRA", *(m for m in methods or vision_methods() if m != "SeqLoRA")]
    tasks = list(stream(max(PAST) + 2, batch_size * steps, img_size))
    costs = {
        name: _built(name, model, img_size, batch_size, len(tasks), device, dtype) for name in names
    }
    for past, experience in enumerate(tasks[:-1]):
        for cost in costs.values():
            _train(cost, past, experience, epochs)
        for cost in costs.values():
            if past in PAST:
                cost.ratio[past] = cost.ms[past] / costs["SeqLoRA"].ms[past]
    for cost in costs.values():
        cost.strategy.train_epochs = 1
        cost.peak = peak_bytes(cost.strategy, tasks[-1])
    Console(width=130).print(
        _table(costs, f"{model} at {img_size} px, batch {batch_size}, {dtype}, {device}")
    )
    return _missed(costs)


def _built(
    name: str, model: str, img_size: int, batch_size: int, n_tasks: int, device: str, dtype: str
) -> Cost:
    torch.manual_seed(0)
    watch = StepTimes()
    settings = RunSettings(scenario="image_folder", data=".", batch_size=batch_size)
    vit = timm.create_model(model, img_size=img_size, num_classes=n_tasks * CLASSES_PER_TASK)
    strategy = build_strategy(
        name,
        settings,
        Ingredients(0, None, vit.to(getattr(torch, dtype))),
        device=torch.device(device),
        plugins=[watch],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    return Cost(strategy, watch)


def _train(cost: Cost, past: int, experience: Any, epochs: int) -> None:
    measured = past in PAST
    cost.strategy.train_epochs = epochs if measured else 1
    cost.watch.times.clear()
    begun = time.perf_counter()
    cost.strategy.train(experience)
    seconds = time.perf_counter() - begun
    if measured:
        times = cost.watch.times
        cost.rest = seconds - sum(times) / 1e3
        cost.ms[past] = statistics.median(times[len(times) // epochs :])
        cost.stored[past] = stored_bytes(cost.strategy)


def peak_bytes(strategy: Any, experience: Any) -> int:
    """The most memory that training an experience adds to what is there before it."""
    if strategy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(strategy.device)
        before = torch.cuda.memory_allocated(strategy.device)
        strategy.train(experience)
        return int(torch.cuda.max_memory_allocated(strategy.device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        strategy.train(experience)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        with open(file.name, encoding="utf-8") as trace:
            events = json.load(trace)["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    added, most = 0, 0
    for _, change in changes:
        added += change
        most = max(most, added)
    return most


def _table(costs: dict[str, Cost], title: str) -> Table:
    table = Table(title=title)
    table.add_column("method")
    headers = [f"ms/step at {past}" for past in PAST]
    for header in (*headers, "rest s/task", "images/s", "peak", "stored/task"):
        table.add_column(header, justify="right")
    for name, cost in costs.items():
        few, many = PAST[1:]
        per_task = (cost.stored[many] - cost.stored[few]) / (many - few)
        images = cost.strategy.train_mb_size * 1e3 / cost.ms[many]
        table.add_row(
            name,
            *(f"{cost.ms[past]:.1f} ({cost.ratio[past]:.2f})" for past in PAST),
            f"{cost.rest:.2f}",
            f"{images:.0f}",
            short_bytes(cost.peak),
            short_bytes(per_task),
        )
    return table


def _missed(costs: dict[str, Cost]) -> list[str]:
    contenders = {n: c for n, c in costs.items() if n not in PLAIN and n != "TreeLoRA"}
    if "TreeLoRA" not in costs or not contenders:
        return []
    last = PAST[-1]
    cheapest = min(contenders, key=lambda name: contenders[name].ms[last])
    own, other = costs["TreeLoRA"].ms[last], contenders[cheapest].ms[last]
    if own <= TOLERANCE * other:
        return []
    return [
        f"TreeLoRA's step takes {own / other:.3f} of {cheapest}'s with {last} past tasks; it "
        f"should be the cheapest against forgetting (at most {TOLERANCE} of any other's)"
    ]


if __name__ == "__main__":
    run(method_cost)
