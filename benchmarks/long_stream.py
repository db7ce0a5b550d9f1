"""A stream of many tasks: the time of a step and the memory of a process must stay where they are.

TreeLoRA on a tiny ViT and random images, two tasks' worth of steps at a time compared: the median
of the first hundred tasks with a tree against that of the last hundred. The stored adapters grow by
their own size per task, on the host; with ``max_adapters`` they stop there.

    python benchmarks/long_stream.py --check
"""

from __future__ import annotations

import statistics
import warnings

import psutil
import torch
from _command import chosen_clock, run
from avalanche.training.plugins import EvaluationPlugin
from rich.console import Console
from rich.table import Table
from step_overhead import StepTimes, random_stream
from timm.models.vision_transformer import VisionTransformer

from treelora_avalanche.reports.table import short_bytes
from treelora_avalanche.strategies import TreeLoRAStrategy

TARGET = 1.1  # last over first
WINDOW = 100


def long_stream_table(n_tasks: int, device: str, cpu_time: bool) -> tuple[Table, list[str]]:
    """The table, and the targets that are missed.

    :param n_tasks: length of the stream, at least twice a hundred.
    :param device: where to train.
    :param cpu_time: see :func:`long_stream`.
    """
    now = chosen_clock(cpu_time)
    watch = StepTimes(now)
    strategy = TreeLoRAStrategy(
        VisionTransformer(
            img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=2
        ),
        layers="all",
        rank=4,
        train_mb_size=16,
        train_epochs=1,
        device=device,
        plugins=[watch],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    experience = random_stream(4 * 16, 16)[0]
    steps, whole, memory, held = [], [], [], []
    process = psutil.Process()
    for _ in range(n_tasks):
        watch.times.clear()
        begun = now()
        strategy.train(experience)
        whole.append(1e3 * (now() - begun))
        steps.append(statistics.median(watch.times))
        memory.append(
            torch.cuda.memory_allocated(device)
            if torch.device(device).type == "cuda"
            else process.memory_info().rss
        )
        held.append(strategy.bank.nbytes)
    parts = (slice(1, 1 + WINDOW), slice(n_tasks - WINDOW, n_tasks))
    how = ", processor time" if cpu_time else ""
    table = Table(title=f"TreeLoRA on {n_tasks:,} tasks, a tiny ViT, {device}{how}")
    for column in ("", f"tasks 2 to {WINDOW + 1}", f"last {WINDOW}", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    ratios = []
    for name, values in (("ms per step", steps), ("ms per task", whole)):
        first, last = (statistics.median(values[part]) for part in parts)
        ratios.append(last / first)
        table.add_row(name, f"{first:.2f}", f"{last:.2f}", f"{last / first:.2f}")
    first, last = (statistics.median(memory[part]) for part in parts)
    grown, stored = last - first, held[-1] - held[WINDOW]
    kind = "memory of the GPU" if torch.device(device).type == "cuda" else "memory of the process"
    table.add_row(kind, short_bytes(first), short_bytes(last), f"{last / first:.2f}")
    table.add_row("of it, stored adapters", short_bytes(held[WINDOW]), short_bytes(held[-1]), "")
    missed = []
    if ratios[0] > TARGET:
        missed.append(f"after {n_tasks:,} tasks a step takes {ratios[0]:.2f} of the first ones'")
    allowed = 0 if kind.endswith("GPU") else 2 * stored  # the bank doubles its room when it is full
    if grown > allowed + 0.1 * first:
        missed.append(f"memory has grown by {short_bytes(grown)}, stored: {short_bytes(stored)}")
    return table, missed


def long_stream(n_tasks: int = 1000, device: str = "cpu", cpu_time: bool = False) -> list[str]:
    """Trains a long stream.

    :param n_tasks: length of the stream.
    :param device: where to train.
    :param cpu_time: take the time that this process has had on the processor, see ``_command.py``.
    :return: the missed targets.
    """
    warnings.simplefilter("ignore")
    warnings.showwarning = lambda *_, **__: None  # Avalanche sets filters of its own
    table, missed = long_stream_table(n_tasks, device, cpu_time)
    Console(width=100).print(table)
    return missed


if __name__ == "__main__":
    run(long_stream)
