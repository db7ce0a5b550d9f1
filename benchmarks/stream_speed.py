"""How fast a stream is learned: TreeLoRA with each of its speed-ups in turn, beside its contenders.

All methods learn the same stream for the same number of epochs, and are evaluated after every task
on the tasks so far. They take turns task by task, so that a slow spell of the machine hits all of
them, and what counts are ratios. By default the images are random (speed does not depend on what
they show); with ``--data`` they are a folder of classes, and accuracy is reported too.

* ``ms/step``: median of a training step, and images per second of it; ``s/epoch``: of an epoch,
  data loading included;
* ``train``, ``eval``: seconds of the whole stream, with everything that a method does around its
  steps (statistics, heads, what is kept of the frozen blocks);
* ``faster``: the stream of SeqLoRA with all layers, over this one;
* ``of the limit``: one forward pass of the bare backbone and a backward pass down to the lowest
  adapted block, measured, over a step. What is not computed at all can take it above 1;
* ``peak``: memory that the training of a task allocates at most, beyond the model and what is
  stored, see ``method_cost.py``.

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
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _command import Clock, chosen_clock, run
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from long_stream import long_stream_table
from method_cost import peak_bytes, stream
from rich.console import Console
from rich.table import Table
from selection_cost import selection_cost_table
from step_scaling import step_scaling_table
from torch import nn
from torch.utils.data import DataLoader

from treelora_avalanche.adapters import TrainableView, add_lora
from treelora_avalanche.choices import check_known
from treelora_avalanche.metrics import AccuracyMatrix, overall_performance
from treelora_avalanche.models import create_vit, image_preprocessing
from treelora_avalanche.plugins import FirstSessionPlugin
from treelora_avalanche.provenance import git_hash, hardware, versions
from treelora_avalanche.reports.table import short_bytes
from treelora_avalanche.scenarios import SplitImageFolder
from treelora_avalanche.strategies import L2P, HiDeLoRA, SeqLoRA, TreeLoRAStrategy

BASE, EQUAL = "SeqLoRA, all layers", "TreeLoRA, all layers"
FASTEST, COMPILED = "... and bf16", "... and compiled"
FIRST_SESSION = "... and bf16, all layers in the first task"
FIRST_SESSION_6 = "... and bf16, all in the first task, then 6"
HIDE, HIDE_BF16 = "HiDeLoRA, first 5 layers", "HiDeLoRA, bf16"
TARGET_BARE, TARGET_STEP, TARGET_STREAM, TARGET_HIDE = 1.05, 1.03, 3.0, 5.0
TARGET_POINTS = 1.0  # of accuracy, between all layers and the fastest


def _plain(layers: str) -> Callable[[nn.Module], nn.Module]:
    """A model in which nothing is left out: timm's own pass."""
    return lambda vit: TrainableView(add_lora(vit, layers=layers))


def _tree(**kwargs: Any) -> Callable[..., Any]:
    return lambda vit, **shared: TreeLoRAStrategy(vit, layers="last:5", **kwargs, **shared)


def _first_session(n_blocks: int) -> Callable[..., Any]:
    def build(vit: nn.Module, plugins: list[Any], **shared: Any) -> Any:
        own = [*plugins, FirstSessionPlugin(n_blocks)]
        return TreeLoRAStrategy(vit, layers="all", precision="bf16", plugins=own, **shared)

    return build


def _hide(**kwargs: Any) -> Callable[..., Any]:
    return lambda vit, **shared: HiDeLoRA(vit, layers="first:5", **kwargs, **_own_head(shared))


# From a backbone and the arguments that all share; and the adapted blocks, for the limit.
ROWS: dict[str, tuple[Callable[..., Any], str]] = {
    BASE: (lambda vit, **shared: SeqLoRA(_plain("all")(vit), cache=None, **shared), "all"),
    EQUAL: (
        lambda vit, **shared: TreeLoRAStrategy(_plain("all")(vit), cache=None, **shared),
        "all",
    ),
    "TreeLoRA, last 5 layers": (
        lambda vit, **shared: TreeLoRAStrategy(_plain("last:5")(vit), cache=None, **shared),
        "last:5",
    ),
    "... and the class token alone": (_tree(cache=None), "last:5"),
    "... and frozen blocks kept": (_tree(), "last:5"),
    FASTEST: (_tree(precision="bf16"), "last:5"),
    FIRST_SESSION: (_first_session(5), "last:5"),
    FIRST_SESSION_6: (_first_session(6), "last:6"),
    COMPILED: (_tree(precision="bf16", compile=True), "last:5"),
    HIDE: (_hide(), "all"),
    HIDE_BF16: (_hide(precision="bf16"), "all"),
    "L2P": (lambda vit, **shared: L2P(model=vit, **_own_head(shared)), "all"),
}


def _own_head(shared: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in shared.items() if name != "head"}


class Watch(SupervisedPlugin):
    """Milliseconds of every step, and seconds of every epoch.

    :param clock: seconds of some kind.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.steps: list[float] = []
        self.epochs: list[float] = []

    def _now(self, strategy: Any) -> float:
        _synchronize(strategy.device)
        return self.clock()

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Starts the watch of an epoch."""
        self._epoch = self._now(strategy)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.epochs.append(self._now(strategy) - self._epoch)

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Starts the watch of a step."""
        self._step = self._now(strategy)

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.steps.append(1e3 * (self._now(strategy) - self._step))


@dataclass
class Measured:
    """One row while it is measured."""

    strategy: Any
    layers: str
    watch: Watch
    matrix: AccuracyMatrix
    train: float = 0.0
    eval: float = 0.0
    peak: int = 0

    @property
    def stream(self) -> float:
        """Seconds of the whole stream."""
        return self.train + self.eval

    @property
    def accuracy(self) -> float:
        """Mean over the tasks seen, in percent."""
        return float(100 * overall_performance(self.matrix.result()))

    @property
    def ms(self) -> float:
        """Of a step."""
        return statistics.median(self.watch.steps)

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return statistics.median(self.watch.epochs)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def bare_loop(
    model: nn.Module, dataset: Any, batch_size: int, device: torch.device, clock: Clock
) -> float:
    """Seconds of an epoch of what anybody would write."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.005)
    model.train()
    begun = clock()
    for images, targets, *_ in DataLoader(dataset.train(), batch_size, shuffle=True):
        optimizer.zero_grad()
        logits = model(images.to(device))
        nn.functional.cross_entropy(logits, targets.to(device)).backward()
        optimizer.step()
    _synchronize(device)
    return clock() - begun


def limit(vit: Any, layers: str, images: torch.Tensor, clock: Clock) -> float:
    """Milliseconds of a forward pass and of a backward pass down to the lowest adapted block."""
    first = 0 if layers == "all" else len(vit.blocks) - int(layers.removeprefix("last:"))
    begun = clock()
    with torch.no_grad():
        hidden = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block in vit.blocks[:first]:
            hidden = block(hidden)
    hidden.requires_grad_()
    for block in vit.blocks[first:]:
        hidden = block(hidden)
    vit.forward_head(vit.norm(hidden)).logsumexp(1).sum().backward()
    _synchronize(images.device)
    return 1e3 * (clock() - begun)


def _built(
    name: str,
    vit: nn.Module,
    batch_size: int,
    epochs: int,
    lr: float,
    seed: int,
    device: torch.device,
    clock: Clock,
) -> Measured:
    torch.manual_seed(seed)
    build, layers = ROWS[name]
    watch, matrix = Watch(clock), AccuracyMatrix()
    strategy = build(
        vit,
        optimizer=partial(torch.optim.Adam, lr=lr),
        head="task_adaptive",
        train_mb_size=batch_size,
        train_epochs=epochs,
        eval_mb_size=256,
        device=device,
        plugins=[watch],
        evaluator=EvaluationPlugin(matrix, loggers=[]),
    )
    return Measured(strategy, layers, watch, matrix)


def _learn(row: Measured, experience: Any, test: list[Any]) -> None:
    """One task: training, and evaluation on the tasks so far."""
    device = row.strategy.device
    clock = row.watch.clock
    begun = clock()
    row.strategy.train(experience)
    _synchronize(device)
    trained = clock()
    row.strategy.eval(test)
    _synchronize(device)
    row.train += trained - begun
    row.eval += clock() - trained


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
    """Trains one stream by all methods.

    :param model: name of a timm ViT.
    :param img_size: pixels on a side.
    :param batch_size: images per step.
    :param n_tasks: tasks of the stream.
    :param per_task: training images per task, if they are random; a quarter as many for the test.
    :param epochs: epochs per task.
    :param lr: Adam's learning rate.
    :param seed: of the order of classes of ``data``, and of the adapters.
    :param data: a folder with one folder of images per class, in ``train`` and in ``test``. The
        images are read before the clock starts, as whoever reads them first pays for all; and the
        bare loop, which needs no images, is left out.
    :param exclude_classes: classes of ``data`` to leave out.
    :param checkpoint: the model's weights; random without.
    :param rows: rows to measure; by default all but the compiled one.
    :param compile: whether to measure the compiled model too; compiling takes minutes.
    :param device: where to train.
    :param cpu_time: take the time that this process has had on the processor, see ``_command.py``.
    :param parts: whether to measure selection and a long stream too.
    :param write: a page to put the tables into, in Markdown, below what it says already.
    :return: the missed targets.
    """
    warnings.simplefilter("ignore")
    warnings.showwarning = lambda *_, **__: None  # Avalanche sets filters of its own
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
        train = list(stream(n_tasks, per_task, img_size))
        test = list(stream(n_tasks, max(2, per_task // 4), img_size))
        n_classes = 2 * n_tasks
    else:
        classes = sorted({p.name for p in (data / "train").iterdir()} - set(exclude_classes))
        benchmark = SplitImageFolder(
            data,
            n_tasks,
            preprocessing=image_preprocessing(backbone(0)),
            classes=classes[: len(classes) - len(classes) % n_tasks],
            seed=seed,
        )
        train, test = list(benchmark.train_stream), list(benchmark.test_stream)
        n_classes = benchmark.n_classes
        for experience in (*train, *test):
            for _ in experience.dataset:
                pass
    measured = {
        name: _built(name, backbone(n_classes), batch_size, epochs, lr, seed, where, now)
        for name in names
    }
    bare = add_lora(backbone(n_classes), layers="all").to(where)
    vit = backbone(n_classes).to(where).requires_grad_(False)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where)
    loop: list[float] = []
    limits: dict[str, list[float]] = {layers: [] for layers in ("all", "last:5", "last:6")}
    for task, experience in enumerate(train):
        if data is None:
            loop += [
                bare_loop(bare, experience.dataset, batch_size, where, now) for _ in range(epochs)
            ]
        for layers, times in limits.items():
            times += [limit(vit, layers, images, now) for _ in range(5)]
        for row in measured.values():
            _learn(row, experience, test[: task + 1])
    for row in measured.values():
        row.strategy.train_epochs = 1
        row.peak = peak_bytes(row.strategy, train[-1])
    bare_epoch = statistics.median(loop) if loop else math.nan
    table = _table(
        measured,
        bare_epoch,
        {layers: statistics.median(times) for layers, times in limits.items()},
        f"{model} at {img_size} px, batch {batch_size}, {n_tasks} tasks of {epochs} epochs, "
        + (f"{device}, processor time" if cpu_time else device),
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
        _write(write, tables, missed, where)
    return missed


def _table(
    measured: dict[str, Measured],
    loop: float,
    limits: dict[str, float],
    title: str,
    accuracy: bool,
) -> Table:
    table = Table(title=title)
    headers = ["ms/step", "images/s", "s/epoch", "train s", "eval s", "faster", "of the limit"]
    headers += ["peak"]
    headers += ["accuracy"] if accuracy else []
    table.add_column("method")
    for header in headers:
        table.add_column(header, justify="right")
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
    """The issue's targets that are not reached, of the rows that were measured."""
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
    # A first session is a third of a stream of three tasks: it is for whole streams, of real data.
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


def _write(page: Path, tables: list[Table], missed: list[str], device: torch.device) -> None:
    """Puts the tables into a page, under their command and in place of what stood there."""
    options = [o for o in sys.argv[1:] if o != "--check"]
    if "--write" in options:
        at = options.index("--write")
        del options[at : at + 2]
    heading = " ".join(["## python benchmarks/stream_speed.py", *options])
    machine = {**hardware(device), **versions(), "commit": git_hash()}
    lines = [heading, "", ", ".join(f"{k} {v}" for k, v in machine.items() if v) + ".", ""]
    for table in tables:
        cells = [list(column.cells) for column in table.columns]
        lines += [f"**{table.title}**", "", _line(str(c.header) for c in table.columns)]
        lines.append(_line("---:" if c.justify == "right" else "---" for c in table.columns))
        lines += [*(_line(map(str, row)) for row in zip(*cells, strict=True)), ""]
    lines += [f"- Missed: {line}." for line in missed] or ["All targets are reached."]
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, *sections = re.split(r"(?m)^(?=## )", text)
    kept = [section for section in sections if section.splitlines()[0] != heading]
    parts = [part.strip() for part in (before, *kept, "\n".join(lines)) if part.strip()]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run(stream_speed)
