"""What TreeLoRA adds to a training step: milliseconds over SeqLoRA, by the number of past tasks.

Both strategies train the same layers of the same ViT on the same random images (speed does not
depend on what they show). Their steps alternate in short bursts, so that a slow spell of the
machine hits all of them, and what is compared are medians.

    python benchmarks/step_overhead.py --check
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterable
from typing import Any

import timm
import torch
from _command import Clock, run
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from rich.table import Table

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

TARGET_AT_8 = 1.05
TARGET_512_OVER_8 = 1.03


class StepTimes(SupervisedPlugin):
    """Milliseconds of every step, the wait for the device included.

    :param clock: seconds of some kind.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        super().__init__()
        self.clock = clock
        self.times: list[float] = []

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Starts the watch."""
        self._start = self.clock()

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stops the watch."""
        if strategy.device.type != "cpu":
            torch.accelerator.synchronize(strategy.device)
        self.times.append(1e3 * (self.clock() - self._start))


def random_stream(n_samples: int, img_size: int) -> Any:
    """One experience of random images with two classes."""
    images = torch.randn(n_samples, 3, img_size, img_size)
    targets = torch.arange(n_samples) % 2
    dataset = _make_taskaware_tensor_classification_dataset(images, targets, task_labels=0)
    return nc_benchmark(dataset, dataset, n_experiences=1, task_labels=False).train_stream


def with_past_tasks(strategy: TreeLoRAStrategy, n_tasks: int) -> TreeLoRAStrategy:
    """Gives a strategy ``n_tasks`` past tasks whose adapters are random."""
    factors = LoRAFactors(strategy.model)
    live = factors.stack.clone()
    size = min(256, *(shape.size for shape in factors.shapes))
    for _ in range(n_tasks):
        signature = torch.randn(len(factors.shapes), size)
        strategy.tree.insert(torch.nn.functional.normalize(signature, p=1.0, dim=1))
        factors.stack.normal_(std=0.01)
        strategy.bank.append(factors)
    factors.stack.copy_(live)
    return strategy


def watched(
    kind: type[SeqLoRA],
    model: str,
    img_size: int,
    batch_size: int,
    device: str,
    clock: Clock = time.perf_counter,
    **kwargs: Any,
) -> tuple[Any, StepTimes]:
    """A strategy on a ViT with random weights, and the times of its steps.

    :param kind: class of the strategy.
    :param model: name of a timm ViT.
    :param img_size: pixels on a side.
    :param batch_size: images per step.
    :param device: where to train.
    :param clock: seconds of some kind.
    :param kwargs: further arguments of the strategy.
    """
    torch.manual_seed(0)
    watch = StepTimes(clock)
    return kind(
        timm.create_model(model, img_size=img_size, num_classes=100),
        train_mb_size=batch_size,
        train_epochs=1,
        device=device,
        plugins=[watch],
        evaluator=None,
        **kwargs,
    ), watch


def take_turns(rows: Iterable[tuple[Any, StepTimes]], experience: Any, bursts: int) -> list[float]:
    """Medians of the steps of several strategies, which train in turns.

    :param rows: strategies and their watches.
    :param experience: one burst of steps.
    :param bursts: per strategy; the first is not counted.
    """
    rows = list(rows)
    for burst in range(bursts):
        for strategy, watch in rows:
            strategy.train(experience)
            if burst == 0:
                watch.times.clear()
    return [statistics.median(watch.times) for _, watch in rows]


def step_overhead(
    model: str = "deit_tiny_patch16_224",
    img_size: int = 112,
    batch_size: int = 32,
    past_tasks: tuple[int, ...] = (1, 8, 64, 512),
    rounds: int = 12,
    steps_per_round: int = 4,
    device: str = "cpu",
) -> list[str]:
    """Compares the steps of TreeLoRA and SeqLoRA.

    :param model: name of a timm ViT; its weights are random.
    :param img_size: pixels on a side.
    :param batch_size: images per step.
    :param past_tasks: numbers of past tasks of TreeLoRA.
    :param rounds: bursts of steps per strategy; the first is not counted.
    :param steps_per_round: steps per burst.
    :param device: where to train.
    :return: the missed targets.
    """
    warnings.simplefilter("ignore")
    experience = random_stream(batch_size * steps_per_round, img_size)[0]

    shared = (model, img_size, batch_size, device)
    rows = {"SeqLoRA": watched(SeqLoRA, *shared)}
    for n_tasks in past_tasks:
        strategy, watch = watched(TreeLoRAStrategy, *shared)
        rows[f"TreeLoRA, {n_tasks} past"] = (with_past_tasks(strategy, n_tasks), watch)

    medians = dict(zip(rows, take_turns(rows.values(), experience, rounds), strict=True))
    base = medians["SeqLoRA"]
    table = Table(title=f"{model} at {img_size} px, batch {batch_size}, {device}")
    for column in ("strategy", "ms/step (median)", "over SeqLoRA"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    ratios = {}
    for name, median in medians.items():
        ratios[name] = median / base
        table.add_row(name, f"{median:.2f}", f"{ratios[name]:.3f}")
    Console().print(table)

    missed = []
    at_8 = ratios.get("TreeLoRA, 8 past")
    at_512 = ratios.get("TreeLoRA, 512 past")
    if at_8 is not None and at_8 > TARGET_AT_8:
        missed.append(f"TreeLoRA over SeqLoRA at 8 tasks is {at_8:.3f}, above {TARGET_AT_8}")
    if at_8 is not None and at_512 is not None and at_512 / at_8 > TARGET_512_OVER_8:
        missed.append(f"512 over 8 tasks is {at_512 / at_8:.3f}, above {TARGET_512_OVER_8}")
    return missed


if __name__ == "__main__":
    run(step_overhead)
