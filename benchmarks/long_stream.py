"""Time of a step and memory of the process over a stream of many tasks: both must stay constant.

TreeLoRA on a tiny ViT and random images, four steps per task. The median of tasks 2 to 101 is
compared with that of the last hundred. The stored adapters grow by their size per task, on the
host; with ``max_adapters`` they stop growing at that number.

    python benchmarks/long_stream.py --check
"""

from __future__ import annotations

import statistics

import psutil
import torch
from _command import chosen_clock, clock_note, new_table, run
from _steps import StepTimes, random_stream
from avalanche.training.plugins import EvaluationPlugin
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer

from treelora_avalanche.reports.table import short_bytes
from treelora_avalanche.strategies import TreeLoRAStrategy

TARGET = 1.1  # last over first
WINDOW = 100


def long_stream_table(n_tasks: int, device: str, cpu_time: bool) -> tuple[Table, list[str]]:
    """Returns the table, and the missed targets.

    :param n_tasks: length of the stream, at least 200.
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
    experience = random_stream(1, 4 * 16, 16)[0]
    on_gpu = torch.device(device).type == "cuda"
    steps, whole, memory, held = [], [], [], []
    process = psutil.Process()
    for _ in range(n_tasks):
        watch.times.clear()
        start = now()
        strategy.train(experience)
        whole.append(1e3 * (now() - start))
        steps.append(statistics.median(watch.times))
        memory.append(torch.cuda.memory_allocated(device) if on_gpu else process.memory_info().rss)
        held.append(strategy.bank.nbytes)
    parts = (slice(1, 1 + WINDOW), slice(n_tasks - WINDOW, n_tasks))
    table = new_table(
        f"TreeLoRA on {n_tasks:,} tasks, a tiny ViT, {device}{clock_note(cpu_time)}",
        ("", f"tasks 2 to {WINDOW + 1}", f"last {WINDOW}", "ratio"),
    )
    ratios = []
    for name, values in (("ms per step", steps), ("ms per task", whole)):
        first, last = (statistics.median(values[part]) for part in parts)
        ratios.append(last / first)
        table.add_row(name, f"{first:.2f}", f"{last:.2f}", f"{last / first:.2f}")
    first, last = (statistics.median(memory[part]) for part in parts)
    grown, stored = last - first, held[-1] - held[WINDOW]
    kind = "memory of the GPU" if on_gpu else "memory of the process"
    table.add_row(kind, short_bytes(first), short_bytes(last), f"{last / first:.2f}")
    table.add_row("of it, stored adapters", short_bytes(held[WINDOW]), short_bytes(held[-1]), "")
    missed = []
    if ratios[0] > TARGET:
        missed.append(
            f"after {n_tasks:,} tasks a step takes {ratios[0]:.2f} of a first one, above {TARGET}"
        )
    allowed = 0 if on_gpu else 2 * stored  # a full bank doubles its capacity
    if grown > allowed + 0.1 * first:
        missed.append(f"memory has grown by {short_bytes(grown)}, stored: {short_bytes(stored)}")
    return table, missed


def long_stream(n_tasks: int = 1000, device: str = "cpu", cpu_time: bool = False) -> list[str]:
    """Trains on a long stream.

    :param n_tasks: length of the stream, at least 200.
    :param device: where to train.
    :param cpu_time: whether to count the processor time of this process, see ``_command.py``.
    :return: the missed targets.
    """
    table, missed = long_stream_table(n_tasks, device, cpu_time)
    Console(width=100).print(table)
    return missed


if __name__ == "__main__":
    run(long_stream)
