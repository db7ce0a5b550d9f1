"""Speed of learning a stream: TreeLoRA with each of its speed-ups in turn, and baselines.

All methods learn the same stream for the same number of epochs, and are evaluated after every task
on the tasks so far. They take turns task by task, so that a slow spell of the machine affects all
of them; ratios are compared. By default the images are random (speed does not depend on them); with
``--data`` they are a folder of classes, and accuracy is reported too.

* ``ms/step``: median of a training step, and images per second of it; ``s/epoch``: of an epoch,
  data loading included;
* ``train``, ``eval``: seconds of the whole stream, including statistics, heads and caches;
* ``faster``: the stream of SeqLoRA with all layers, over this one;
* ``of the limit``: one forward pass of the bare backbone and a backward pass down to the lowest
  adapted block, measured, over a step. It is above 1 if a method skips part of these passes;
* ``peak``: most bytes that the training of a task allocates, beyond the model and stored state, see
  ``method_cost.py``.

Three tables follow: what selection, pull and bookkeeping add to a step by the number of past tasks,
a whole step by layers, rank and tokens, and a stream of many tasks (``selection_cost.py``,
``step_scaling.py``, ``long_stream.py``).

    python benchmarks/stream_speed.py --check --write docs/performance.md
    python benchmarks/stream_speed.py --data ../shared/data/caltech101 \\
        --checkpoint ../shared/data/deit_tiny_patch16_224_in1k/model.fp16.safetensors
    python benchmarks/stream_speed.py --model vit_base_patch16_224 --img_size 224 \\
        --batch_size 192 --per_task 1920 --device cuda --compile true
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _command import chosen_clock, clock_note, new_table, run
from _markdown import write_section
from _memory import peak_of_training
from _speed_rows import (
    BASE,
    COMPILED,
    EQUAL,
    FASTEST,
    FIRST_SESSION,
    FIRST_SESSION_6,
    HIDE,
    ROWS,
    Measured,
    bare_loop,
    build_row,
    learn,
    limit,
)
from _steps import random_stream
from long_stream import long_stream_table
from rich.console import Console
from rich.table import Table
from selection_cost import selection_cost_table
from step_scaling import step_scaling_table

from treelora_avalanche.adapters import add_lora
from treelora_avalanche.choices import check_known
from treelora_avalanche.models import create_vit, image_preprocessing
from treelora_avalanche.reports.table import short_bytes
from treelora_avalanche.scenarios import SplitImageFolder

TARGET_BARE, TARGET_STEP, TARGET_STREAM, TARGET_HIDE = 1.05, 1.03, 3.0, 5.0
TARGET_POINTS = 1.0  # of accuracy, between all layers and the fastest


class Stream(NamedTuple):
    """Experiences for training and testing."""

    train: list[Any]
    test: list[Any]
    n_classes: int


def stream_of_folder(
    data: Path, exclude_classes: tuple[str, ...], n_tasks: int, preprocessing: Any, seed: int
) -> Stream:
    """Returns a stream of a folder of classes, whose images have been read once.

    :param data: a folder with one folder of images per class, in ``train`` and in ``test``.
    :param exclude_classes: classes to leave out.
    :param n_tasks: number of tasks.
    :param preprocessing: how images are resized.
    :param seed: seed of the class order.
    """
    classes = sorted({p.name for p in (data / "train").iterdir()} - set(exclude_classes))
    benchmark = SplitImageFolder(
        data,
        n_tasks,
        preprocessing=preprocessing,
        classes=classes[: len(classes) - len(classes) % n_tasks],
        seed=seed,
    )
    train, test = list(benchmark.train_stream), list(benchmark.test_stream)
    for experience in (*train, *test):  # before the clock starts, as the first reader pays for all
        for _ in experience.dataset:
            pass
    return Stream(train, test, benchmark.n_classes)


def stream_speed(
    model: str = "deit_tiny_patch16_224",
    img_size: int = 112,
    batch_size: int = 32,
    n_tasks: int = 3,
    per_task: int = 96,
    epochs: int = 5,
    lr: float = 0.003,
    seed: int = 0,
    data: Path | None = None,
    exclude_classes: tuple[str, ...] = (),
    checkpoint: Path | None = None,
    rows: tuple[str, ...] | None = None,
    compile: bool = False,
    device: str = "cpu",
    cpu_time: bool = False,
    parts: bool = True,
    write: Path | None = None,
) -> list[str]:
    """Trains all methods on one stream.

    :param model: name of a timm ViT.
    :param img_size: pixels on a side.
    :param batch_size: images per step.
    :param n_tasks: tasks of the stream.
    :param per_task: training images per task, if they are random; a quarter as many for the test.
    :param epochs: epochs per task.
    :param lr: Adam's learning rate.
    :param seed: seed of the class order of ``data``, and of the adapters.
    :param data: a folder with one folder of images per class, in ``train`` and in ``test``. The
        images are read before the clock starts, and the bare loop is left out.
    :param exclude_classes: classes of ``data`` to leave out.
    :param checkpoint: the model's weights; random without.
    :param rows: rows to measure; by default all but the compiled one.
    :param compile: whether to measure the compiled model too; compilation takes minutes.
    :param device: where to train.
    :param cpu_time: whether to count the processor time of this process, see ``_command.py``.
    :param parts: whether to measure selection, scaling and a long stream too.
    :param write: a Markdown page into which the tables are written, as a section of its own.
    :return: the missed targets.
    """
    for row in rows or ():
        check_known("row in `rows`", row, ROWS)
    names = rows or tuple(name for name in ROWS if compile or name != COMPILED)
    where = torch.device(device)
    now = chosen_clock(cpu_time)

    def backbone(n_classes: int) -> Any:
        torch.manual_seed(0)
        return create_vit(
            model, num_classes=n_classes, checkpoint=checkpoint, img_size=img_size, pretrained=False
        )

    if data is None:
        train = list(random_stream(n_tasks, per_task, img_size))
        test = list(random_stream(n_tasks, max(2, per_task // 4), img_size))
        stream = Stream(train, test, 2 * n_tasks)
    else:
        preprocessing = image_preprocessing(backbone(0))
        stream = stream_of_folder(data, exclude_classes, n_tasks, preprocessing, seed)
    measured = {
        name: build_row(name, backbone(stream.n_classes), batch_size, epochs, lr, seed, where, now)
        for name in names
    }
    bare = add_lora(backbone(stream.n_classes), layers="all").to(where)
    vit = backbone(stream.n_classes).to(where).requires_grad_(False)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where)
    loop: list[float] = []
    limits: dict[str, list[float]] = {layers: [] for layers in ("all", "last:5", "last:6")}
    for task, experience in enumerate(stream.train):
        if data is None:
            loop += [
                bare_loop(bare, experience.dataset, batch_size, where, now) for _ in range(epochs)
            ]
        for layers, times in limits.items():
            times += [limit(vit, layers, images, now) for _ in range(5)]
        for row in measured.values():
            learn(row, experience, stream.test[: task + 1])
    for row in measured.values():
        row.strategy.train_epochs = 1
        row.peak = peak_of_training(row.strategy, stream.train[-1])
    bare_epoch = statistics.median(loop) if loop else math.nan
    table = _table(
        measured,
        bare_epoch,
        {layers: statistics.median(times) for layers, times in limits.items()},
        f"{model} at {img_size} px, batch {batch_size}, {n_tasks} tasks of {epochs} epochs, "
        f"{device}{clock_note(cpu_time)}",
        accuracy=data is not None,
    )
    missed = _missed(measured, bare_epoch, accuracy=data is not None)
    tables = [table]
    if parts:
        selection, missed_there = selection_cost_table(
            (8, 64, 512), (8, 512, 10_000), device, cpu_time
        )
        tables += [selection, step_scaling_table(model, max(1, batch_size // 4), device, cpu_time)]
        many_tasks, missed_later = long_stream_table(1000, device, cpu_time)
        tables.append(many_tasks)
        missed += missed_there + missed_later
    for each in tables:
        Console(width=130).print(each)
    if write is not None:
        write_section(write, "benchmarks/stream_speed.py", tables, missed, where)
    return missed


def _table(
    measured: dict[str, Measured],
    loop: float,
    limits: dict[str, float],
    title: str,
    accuracy: bool,
) -> Table:
    headers = ["ms/step", "images/s", "s/epoch", "train s", "eval s", "faster", "of the limit"]
    headers += ["peak", "accuracy"] if accuracy else ["peak"]
    table = new_table(title, ("method", *headers))
    if not math.isnan(loop):
        table.add_row("PyTorch loop, LoRA in all layers", "", "", f"{loop:.2f}")
    base = measured.get(BASE)
    for name, row in measured.items():
        cells = [
            f"{row.ms:.1f}",
            f"{1e3 * row.strategy.train_mb_size / row.ms:.0f}",
            f"{row.epoch:.2f}",
            f"{row.train:.1f}",
            f"{row.eval:.1f}",
            "" if base is None else f"{base.stream / row.stream:.2f}",
            f"{limits[row.layers] / row.ms:.2f}",
            short_bytes(row.peak),
        ]
        if accuracy:
            cells.append(f"{row.accuracy:.1f}")
        table.add_row(name, *cells)
    return table


def _missed(measured: dict[str, Measured], loop: float, accuracy: bool) -> list[str]:
    """Returns the missed targets of the measured rows."""
    missed = []

    def at_most(what: str, ratio: float, target: float) -> None:
        if ratio > target:
            missed.append(f"{what} is {ratio:.3f}, above {target:.3f}")

    def at_least(what: str, ratio: float, target: float) -> None:
        if ratio < target:
            missed.append(f"{what} is {ratio:.2f}, below {target}")

    base, equal, fastest = (measured.get(name) for name in (BASE, EQUAL, FASTEST))
    if base is not None and not math.isnan(loop):
        at_most("an epoch of SeqLoRA over the bare loop's", base.epoch / loop, TARGET_BARE)
    if base is not None and equal is not None:
        at_most("TreeLoRA's step over SeqLoRA's, all layers", equal.ms / base.ms, TARGET_STEP)
    # Of three tasks the first session is a third: its target is for longer streams, of real data.
    for name in (FASTEST, FIRST_SESSION, FIRST_SESSION_6)[: 3 if accuracy else 1]:
        if base is not None and name in measured:
            ratio = base.stream / measured[name].stream
            at_least(f"SeqLoRA's stream over TreeLoRA's ({name})", ratio, TARGET_STREAM)
    if HIDE in measured and fastest is not None:
        ratio = measured[HIDE].stream / fastest.stream
        at_least("HiDeLoRA's stream over TreeLoRA's", ratio, TARGET_HIDE)
    for name in (FIRST_SESSION, FIRST_SESSION_6) if accuracy else ():
        if equal is not None and name in measured:
            lost = equal.accuracy - measured[name].accuracy
            at_most(f"points of accuracy lost to all layers ({name})", lost, TARGET_POINTS)
    return missed


if __name__ == "__main__":
    run(stream_speed)
