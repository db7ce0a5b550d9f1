"""Recovery of related tasks by the selectors, on streams with known relations.

A task is related to the tasks of its group:

* ``digits``: five pairs of classes, each pair twice, on disjoint halves of its images (10 tasks);
* ``pacs``: the four domains of PACS, each twice, on disjoint halves of its images (8 tasks);
* ``caltech101``: four classes per task, all mammals, all vehicles or all about music (7 tasks).

Plain LoRA is trained on the tasks in random order, once ``carried``: a task starts from the factors
of the previous one; and once from a ``common`` start: the same initial factors, head and optimizer
for every task. The picks of LCB and of the exact nearest are then replayed from the sketches
recorded at every step, as the plugins compute them. Signatures compared:

* ``displacement``: the direction in which the task has moved the factors, used by the library;
* ``values``: the factors, divided by their L1 norm;
* ``values of A``: the same of the factor A alone, as in the code released with the paper.

The tasks that follow one of their group are counted. ``nearest`` and ``LCB`` are the shares of
their layers whose pick at the end of the task is of the own group. Two controls compare nothing:
``latest`` picks the previous task, and ``random`` any past task, which is of the group with the
share of the group among the past. All are means over the orders (seeds), ``±`` the standard
deviation over these. Chance is beaten if the mean excess over ``random`` of all tasks is above two
of its standard errors.

Streams whose data are missing are skipped.

    python benchmarks/task_similarity.py
    python benchmarks/task_similarity.py --streams '[digits]' --seeds 5
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _command import DATA, new_table, required_path, run
from _related_streams import deit_tiny
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from treelora_avalanche.adapters import LoRAFactors, SignatureSketch
from treelora_avalanche.bandit import LCBSearch
from treelora_avalanche.choices import check_known
from treelora_avalanche.models import image_preprocessing, pretrained_digits_vit
from treelora_avalanche.models.digits import load_digits
from treelora_avalanche.scenarios import CALTECH101_GROUPS, DomainImageFolder, SplitImageFolder
from treelora_avalanche.strategies import SeqLoRA
from treelora_avalanche.tree import AdapterTree

CLASSES_PER_TASK = 4
STARTS = ("carried", "common")


class Task(NamedTuple):
    """Training images of one task, and its group."""

    group: str
    images: Tensor  # (n, channels, height, width)
    labels: Tensor  # (n,)


class Stream(NamedTuple):
    """Tasks in order of arrival."""

    tasks: list[Task]
    model: Callable[[], nn.Module]
    lr: float  # default of Adam


def draw(
    labels: Tensor, classes: Sequence[int], parts: int, size: int, generator: torch.Generator
) -> list[Tensor]:
    """Draws rows of ``parts`` disjoint, balanced samples of classes, at most ``size`` in each."""
    drawn = []  # for each class: its rows for each part
    for label in classes:
        rows = (labels == label).nonzero().squeeze(1)
        n = min(size // len(classes), len(rows) // parts)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        drawn.append(shuffled[: n * parts].view(parts, n))
    return list(torch.cat(drawn, dim=1))


def shuffled(tasks: list[Task], generator: torch.Generator) -> list[Task]:
    """Returns the tasks in random order."""
    return [tasks[i] for i in torch.randperm(len(tasks), generator=generator).tolist()]


def digits_stream(data: Path, seed: int, size: int) -> Stream:
    """Returns pairs of digits, each pair twice."""
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    tasks = []
    for pair in torch.randperm(10, generator=generator).view(5, 2).tolist():
        for rows in draw(digits.train_labels, pair, 2, size, generator):
            images, labels = digits.train_images[rows], digits.train_labels[rows]
            tasks.append(Task("{} and {}".format(*pair), images, labels))
    return Stream(shuffled(tasks, generator), partial(pretrained_digits_vit, 0), 0.001)


def pacs_stream(data: Path, seed: int, size: int) -> Stream:
    """Returns the domains of PACS, each twice."""
    generator = torch.Generator().manual_seed(seed)
    model = deit_tiny(data, num_classes=7)
    benchmark = DomainImageFolder(
        required_path(data, "pacs"),
        preprocessing=image_preprocessing(model()),
        shuffle=False,
        cache_bytes=0,
    )
    tasks = []
    for domain, experience in zip(benchmark.domain_names, benchmark.train_stream, strict=True):
        targets = torch.tensor(list(experience.dataset.targets))
        for rows in draw(targets, range(benchmark.n_classes), 2, size, generator):
            tasks.append(Task(domain, pixels(experience.dataset, rows), targets[rows]))
    return Stream(shuffled(tasks, generator), model, 0.003)


def caltech101_stream(data: Path, seed: int, size: int) -> Stream:
    """Returns classes of Caltech-101 by group; which classes form a task is drawn."""
    generator = torch.Generator().manual_seed(seed)
    classes, groups = [], []
    for group, names in CALTECH101_GROUPS.items():
        classes += [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        groups += [group] * (len(names) // CLASSES_PER_TASK)
    model = deit_tiny(data, num_classes=len(classes))
    benchmark = SplitImageFolder(
        required_path(data, "caltech101"),
        len(groups),
        classes=classes,
        shuffle=False,
        preprocessing=image_preprocessing(model()),
        cache_bytes=0,
    )
    tasks = []
    for group, experience in zip(groups, benchmark.train_stream, strict=True):
        targets = torch.tensor(list(experience.dataset.targets))
        (rows,) = draw(targets, targets.unique().tolist(), 1, size, generator)
        tasks.append(Task(group, pixels(experience.dataset, rows), targets[rows]))
    return Stream(shuffled(tasks, generator), model, 0.003)


STREAMS = {"digits": digits_stream, "pacs": pacs_stream, "caltech101": caltech101_stream}


def pixels(dataset: Dataset, rows: Tensor) -> Tensor:
    """Returns the images in these rows, normalised for the model."""
    return torch.stack([dataset[row][0] for row in rows.tolist()])


class Recorder(SupervisedPlugin):
    """Records the sketch of the factors at the start of each task and after each of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[list[Tensor]] = []  # for each task (n_layers, size) at each step

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the start."""
        self.factors = LoRAFactors(strategy.model)
        self.sketch = SignatureSketch(self.factors.shapes)
        self.traces.append([self.sketch(self.factors.stack)])

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records a step."""
        self.traces[-1].append(self.sketch(self.factors.stack))


class Record(NamedTuple):
    """Sketches of one run through a stream."""

    traces: list[Tensor]  # for each task (1 + n_steps, n_layers, size)
    in_a: Tensor  # (n_layers, size), bool: whether a coordinate is of A


def record(
    stream: Stream, common: bool, lr: float, epochs: int, batch_size: int, seed: int
) -> Record:
    """Trains plain LoRA on the stream, every task from a common start or carried on."""
    tensors = [(task.images, task.labels) for task in stream.tasks]
    benchmark = tensors_benchmark(tensors, tensors, task_labels=[0] * len(tensors))
    torch.manual_seed(seed)
    recorder = Recorder()
    strategy = SeqLoRA(
        stream.model(),
        optimizer=partial(torch.optim.Adam, lr=lr),
        train_mb_size=batch_size,
        train_epochs=epochs,
        plugins=[recorder],
        evaluator=None,
    )
    start = {name: p.detach().clone() for name, p in strategy.model.named_parameters()}
    for experience in benchmark.train_stream:
        if common:
            with torch.no_grad():
                for name, parameter in strategy.model.named_parameters():
                    parameter.copy_(start[name])
        strategy.train(experience, reset_optimizer_state=common)
    n_in_a = torch.tensor([[shape.rank * shape.n_in] for shape in recorder.factors.shapes])
    traces = [torch.stack(trace) for trace in recorder.traces]
    return Record(traces, recorder.sketch.coordinates < n_in_a)


SIGNATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "displacement": lambda trace, in_a: trace[1:] - trace[0],
    "values": lambda trace, in_a: trace[1:],
    "values of A": lambda trace, in_a: trace[1:] * in_a,
}
"""The running signature after each step of a trace, not normalised."""


class Picks(NamedTuple):
    """Shares of layers whose pick is of the task's own group; one value for each task counted."""

    nearest: Tensor
    lcb: Tensor
    latest: Tensor
    random: Tensor


def replay(record: Record, signature: str, groups: list[str], seed: int) -> Picks:
    """Returns the picks of the selectors at the end of each task."""
    tree = AdapterTree()
    shares = []
    for task, trace in enumerate(record.traces):
        running = normalize(SIGNATURES[signature](trace, record.in_a), p=1.0, dim=-1)
        mates = torch.tensor([group == groups[task] for group in groups[:task]])
        if mates.any():
            stored = tree.signatures  # (n_adapters, n_layers, size)
            nearest = (stored - running[-1]).abs().sum(-1).argmin(0)
            lcb = search(tree, running, seed + task).best()
            picked = (mates[nearest], mates[lcb], mates[-1:], mates)
            shares.append([of_group.float().mean() for of_group in picked])
        tree.insert(running[-1])
    return Picks(*torch.tensor(shares).unbind(1))


def search(tree: AdapterTree, running: Tensor, seed: int) -> LCBSearch:
    """Runs the search of ``LCBSelectorPlugin`` over a task, ``(n_steps, n_layers, size)``."""
    n_steps, n_layers, _ = running.shape
    search = LCBSearch(tree.flatten(), n_layers, horizon=n_steps, seed=seed)
    layers = torch.arange(n_layers)
    for signature in running:
        picked = tree.signatures[search.select(), layers]
        search.update((signature - picked).abs().sum(-1))
    return search


def over_seeds(shares: Sequence[Tensor], spread: bool = True) -> str:
    """Returns the mean and, if ``spread``, the standard deviation of the seeds' means."""
    means = torch.stack([share.mean() for share in shares])
    if len(means) < 2 or not spread:
        return f"{means.mean():.2f}"
    return f"{means.mean():.2f} ± {means.std():.2f}"


def verdict(runs: list[Picks]) -> str:
    """Returns which of the two selections beats chance."""
    found = []
    for name, shares in (
        ("nearest", [picks.nearest for picks in runs]),
        ("LCB", [picks.lcb for picks in runs]),
    ):
        excess = torch.cat(shares) - torch.cat([picks.random for picks in runs])
        beats = excess.mean() > 2 * excess.std() / len(excess) ** 0.5
        found.append(f"{name} {'beats' if beats else 'does not beat'} chance")
    return ", ".join(found)


def task_similarity(
    streams: tuple[str, ...] = tuple(STREAMS),
    seeds: int = 2,
    epochs: int = 3,
    images: int = 112,
    batch_size: int = 16,
    lr: float | None = None,
    data: str = DATA,
) -> list[str]:
    """Trains on the streams and counts the picks.

    :param streams: digits, pacs, caltech101.
    :param seeds: number of orders of each stream.
    :param epochs: epochs per task.
    :param images: training images per task, at most.
    :param batch_size: images per step.
    :param lr: learning rate of Adam; by default 0.001 for digits and 0.003 for DeiT-Tiny.
    :param data: folder with ``pacs``, ``caltech101`` and the weights of DeiT-Tiny.
    :return: an empty list: there is no target.
    """
    for name in streams:
        check_known("`streams`", name, STREAMS)
    if seeds < 1:
        raise ValueError(f"`seeds` should be at least 1, but is {seeds}. Each seed is one order.")
    for name in streams:
        begin = time.perf_counter()
        runs: dict[tuple[str, str], list[Picks]] = {}
        try:
            for seed in range(seeds):
                stream = STREAMS[name](Path(data), seed, images)
                groups = [task.group for task in stream.tasks]
                for start in STARTS:
                    trained = record(
                        stream, start == "common", lr or stream.lr, epochs, batch_size, seed
                    )
                    for signature in SIGNATURES:
                        picks = replay(trained, signature, groups, seed)
                        runs.setdefault((start, signature), []).append(picks)
        except FileNotFoundError as error:
            print(f"{name}: skipped, {error}")
            continue
        steps = sorted({len(trace) - 1 for trace in trained.traces})
        n_tasks = sum(len(picks.random) for picks in runs["common", "displacement"])
        table = new_table(
            f"{name}: {n_tasks} tasks of {seeds} orders, Adam at {lr or stream.lr:g}, "
            f"{' to '.join(map(str, sorted({steps[0], steps[-1]})))} steps a task",
            ("start", "signature", "nearest", "LCB", "latest", "random"),
            n_left=2,
        )
        for (start, signature), of_seeds in runs.items():
            nearest, lcb, latest, random = zip(*of_seeds, strict=True)
            compared = (over_seeds(nearest), over_seeds(lcb))
            controls = (over_seeds(latest, spread=False), over_seeds(random, spread=False))
            table.add_row(start, signature, *compared, *controls)
        Console().print(table)
        verdicts = "; ".join(
            f"{start} start, {verdict(runs[start, 'displacement'])}" for start in STARTS
        )
        print(f"{name} by displacement: {verdicts} ({time.perf_counter() - begin:.0f} s)")
    return []


if __name__ == "__main__":
    run(task_similarity)
