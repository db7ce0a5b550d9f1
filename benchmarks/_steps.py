"""Steps of strategies on random images: streams, watches, and turns that share slow spells."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import timm
import torch
from _command import Clock, synchronize
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

CLASSES_PER_TASK = 2


class StepTimes(SupervisedPlugin):
    """Records the milliseconds of every step, including the wait for the device.

    :param clock: returns seconds.
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
        synchronize(strategy.device)
        self.times.append(1e3 * (self.clock() - self._start))


def random_stream(n_tasks: int, per_task: int, img_size: int) -> Any:
    """Returns a stream of tasks of random images, two classes each.

    :param n_tasks: number of tasks.
    :param per_task: images per task.
    :param img_size: pixels on a side.
    """
    n_classes = n_tasks * CLASSES_PER_TASK
    images = torch.randn(n_tasks * per_task, 3, img_size, img_size)
    targets = torch.arange(n_tasks * per_task) % n_classes
    data = _make_taskaware_tensor_classification_dataset(images, targets, task_labels=0)
    return nc_benchmark(data, data, n_experiences=n_tasks, task_labels=False).train_stream


def with_past_tasks(strategy: TreeLoRAStrategy, n_tasks: int) -> TreeLoRAStrategy:
    """Gives a strategy past tasks whose adapters are random.

    :param strategy: the strategy, which is changed in place and returned.
    :param n_tasks: number of past tasks.
    """
    factors = LoRAFactors(strategy.model)
    active = factors.stack.clone()
    size = min(256, *(shape.size for shape in factors.shapes))
    for _ in range(n_tasks):
        signature = torch.randn(len(factors.shapes), size)
        strategy.tree.insert(torch.nn.functional.normalize(signature, p=1.0, dim=1))
        factors.stack.normal_(std=0.01)
        strategy.bank.append(factors)
    factors.stack.copy_(active)
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
    """Returns a strategy on a ViT with random weights, and the times of its steps.

    :param kind: class of the strategy.
    :param model: name of a timm ViT.
    :param img_size: pixels on a side.
    :param batch_size: images per step.
    :param device: where to train.
    :param clock: returns seconds.
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
    """Returns the median step of each of several strategies, which train in turns.

    :param rows: strategies and their watches.
    :param experience: one burst of steps.
    :param bursts: number of bursts per strategy; the first is a warm-up.
    """
    rows = list(rows)
    for burst in range(bursts):
        for strategy, watch in rows:
            strategy.train(experience)
            if burst == 0:
                watch.times.clear()
    return [statistics.median(watch.times) for _, watch in rows]
