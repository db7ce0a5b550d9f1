"""Cost of every method: time per step, memory, and their growth with the past tasks.

The TreeLoRA paper's Table 8 and Figure 4(b), measured. All methods train the same layers of the
same ViT, with random weights, on the same random images (speed does not depend on the images), two
classes per task. The methods take turns task by task, so that a slow spell of the machine affects
all of them; medians of steps are compared, as ratios to SeqLoRA's at the same task.

* ``ms/step at n``: a training step with n past tasks, and in brackets its ratio to SeqLoRA's;
* ``rest``: seconds of a task outside its steps (statistics, heads, decompositions) with 10 past
  tasks;
* ``peak``: most bytes that the training of a task allocates, beyond the model and stored state,
  counted by torch's profiler (on a GPU: by its allocator);
* ``stored/task``: bytes stored per past task, between the 5th and the 10th; images at the size that
  the model receives.

    python benchmarks/method_cost.py --check
    python benchmarks/method_cost.py --model vit_base_patch16_224 --img_size 224 --batch_size 192 \\
        --device cuda --dtype bfloat16
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from _command import new_table, run
from _memory import peak_of_training
from _steps import CLASSES_PER_TASK, StepTimes, random_stream
from avalanche.training.plugins import EvaluationPlugin
from rich.console import Console
from rich.table import Table

from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.registry import METHODS, RunSettings
from treelora_avalanche.reports.table import short_bytes
from treelora_avalanche.runs.setup import Ingredients, build_strategy

PAST = (1, 5, 10)
# Without any measure against forgetting, or not trained task by task.
PLAIN = ("SeqLoRA", "Naive", "Cumulative", "JointTraining")
# Closed form after the first task: there is no step to measure.
WITHOUT_STEPS = ("RanPAC",)
TOLERANCE = 1.05  # noise of equal steps on a busy machine


@dataclass
class Cost:
    """Measurements of one method."""

    strategy: Any
    watch: StepTimes
    ms: dict[int, float] = field(default_factory=dict)
    ratio: dict[int, float] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    rest: float = 0.0
    peak: int = 0


def vision_methods() -> list[str]:
    """Returns the methods that take steps in every task of images, SeqLoRA first."""
    trained = [
        name
        for name, entry in METHODS.items()
        if "vision" in entry.models
        and not entry.frozen
        and not entry.on_all_seen
        and name not in WITHOUT_STEPS
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
    :param methods: names of methods; by default all that take steps in every task of images.
    :param steps: steps per epoch.
    :param epochs: epochs of the measured tasks; the first is a warm-up.
    :param device: where to train.
    :param dtype: dtype of the model, such as bfloat16.
    :return: the missed targets.
    """
    names = ["SeqLoRA", *(m for m in methods or vision_methods() if m != "SeqLoRA")]
    tasks = list(random_stream(max(PAST) + 2, batch_size * steps, img_size))
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
        cost.peak = peak_of_training(cost.strategy, tasks[-1])
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


def _table(costs: dict[str, Cost], title: str) -> Table:
    steps = [f"ms/step at {past}" for past in PAST]
    table = new_table(title, ("method", *steps, "rest s/task", "images/s", "peak", "stored/task"))
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
    baselines = {n: c for n, c in costs.items() if n not in PLAIN and n != "TreeLoRA"}
    if "TreeLoRA" not in costs or not baselines:
        return []
    last = PAST[-1]
    cheapest = min(baselines, key=lambda name: baselines[name].ms[last])
    own, other = costs["TreeLoRA"].ms[last], baselines[cheapest].ms[last]
    if own <= TOLERANCE * other:
        return []
    return [
        f"TreeLoRA's step is {own / other:.3f} of {cheapest}'s, the cheapest against forgetting, "
        f"with {last} past tasks, above {TOLERANCE}"
    ]


if __name__ == "__main__":
    run(method_cost)
