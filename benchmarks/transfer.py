"""Does it matter which past task the tree picks? Every use of the pick, beside controls.

Streams whose relations are known:

* ``domains``: digits in four renditions, each coming twice (8 tasks, all classes in each);
* ``returning``: the same in rounds, A B C D A' B' C' D';
* ``pairs``: five pairs of digits, each coming twice (10 tasks of two classes);
* ``unrelated``: five pairs of digits, each once;
* ``pacs``: the four domains of PACS, each twice (8 tasks);
* ``caltech101``: mammals, vehicles, music; every task has four classes of its own (7 tasks).

Uses of the pick:

* ``start``: a task begins at the picked adapter. Every task keeps its adapter, and at inference a
  sample is routed to one by class statistics; there is no pull.
* ``nodes``: as ``start``, and of every task's adapter the first layers are those of a large group
  of tasks and the last ones its own (Figure 2): layer l is the mean over the node of level l on
  the task's path through a tree of the signatures.
* ``share``: a task begins at the picked adapter; the mean of all tasks' adapters, that of the
  tree's root, answers; there is no pull.
* ``pull``: the sparse update of the paper towards the picked adapter; the live adapter answers.
* ``both``: the pull, with the mean answering and every task beginning there: the library's default
  where the head is task-adaptive.

Picks: ``tree``, found by descending the tree of signatures (``search_cost.py``; for the pull: by
the paper's LCB search); ``nearest``, the exact nearest by signature; ``random``; ``last``, the most
recent one; ``none``, for ``start`` the initial factors, for ``share`` the mean, for the pull none.
The signature is that of :class:`~treelora_avalanche.plugins.TaskStartPlugin`, for the pull that of
the paper.

``at once`` and ``1 epoch``: accuracy of the live adapter on the task's test images, among the
task's classes, before the first step and after one epoch; ``epochs``: to the accuracy that plain
carrying over (``last``) has after all its epochs, the signature included, its forward pass counted
at half a training sample each; where it is not reached, all epochs count. These are means over the
tasks that come after one of their group (on ``unrelated``: all but the first). ``final`` and
``Bwt``: accuracy over all tasks after the last one, and forgetting, both class-incremental.
``own group`` is the share of picks that are of the task's group, and in brackets that of a random
pick. ``±`` is the half-width of the 95% interval of the *paired difference* to ``last`` over seeds.

    python benchmarks/transfer.py --check
    python benchmarks/transfer.py --uses '[pull,both]' --streams '[domains,pairs]'
    python benchmarks/transfer.py --streams '[pacs]' --seeds 2 --epochs 2 --batch_size 32
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _command import run
from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from search_cost import descend
from torch import Tensor, nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, TrainableView
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.choices import check_known
from treelora_avalanche.models import create_vit, image_preprocessing, pretrained_digits_vit
from treelora_avalanche.models.features.signature import stack_samples
from treelora_avalanche.models.views.routed_vit import RoutedAdapters
from treelora_avalanche.plugins import (
    LCBSelectorPlugin,
    MergedAdapterPlugin,
    NearestSelectorPlugin,
    RandomSelectorPlugin,
    RouterPlugin,
    SelectorPlugin,
    SparseUpdatePlugin,
    TaskStartPlugin,
    TreeBuilderPlugin,
)
from treelora_avalanche.scenarios import DomainImageFolder, SplitDigits
from treelora_avalanche.scenarios.related_tasks import (
    CALTECH101_GROUPS,
    DomainDigits,
    GroupedImageFolder,
    ReturningTasks,
)
from treelora_avalanche.strategies import SeqLoRA
from treelora_avalanche.tree import AdapterTree

DATA = os.environ.get("TREELORA_DATA", "../shared/data")
WEIGHTS = "deit_tiny_patch16_224_in1k/model.fp16.safetensors"
USES = ("start", "nodes", "share", "pull", "both")
STARTS = ("start", "nodes", "share")
ROUTED = ("start", "nodes")
PICKS = ("tree", "nearest", "random", "last", "none")

# -------------------------------------------------------------------------------------- the streams


class Stream(NamedTuple):
    benchmark: Any
    groups: list[str]
    model: Callable[[], nn.Module]


def of_digits(benchmark: Any) -> Stream:
    """A stream on the small transformer."""
    groups = getattr(benchmark, "groups", None) or [
        str(i) for i in range(len(benchmark.train_stream))
    ]
    return Stream(benchmark, groups, partial(pretrained_digits_vit, 0))


def of_images(name: str, num_classes: int, make: Callable[..., Any], data: Path) -> Stream:
    """A stream on DeiT-Tiny at 112 pixels."""
    for part in (name, WEIGHTS):
        if not (data / part).exists():
            raise FileNotFoundError(f"{data / part} is missing (set TREELORA_DATA)")
    model = partial(
        create_vit,
        "deit_tiny_patch16_224",
        num_classes=num_classes,
        checkpoint=data / WEIGHTS,
        img_size=112,
    )
    benchmark = make(data / name, preprocessing=image_preprocessing(model()))
    return Stream(benchmark, benchmark.groups, model)


def pacs(root: Path, preprocessing: Any, seed: int) -> Any:
    """The domains of PACS, each twice."""
    once = DomainImageFolder(root, preprocessing=preprocessing, seed=seed)
    return ReturningTasks(once, 2, seed=seed)


STREAMS: dict[str, Callable[[Path, int], Stream]] = {
    "domains": lambda _, seed: of_digits(ReturningTasks(DomainDigits(seed=seed), 2, seed=seed)),
    "returning": lambda _, seed: of_digits(
        ReturningTasks(DomainDigits(seed=seed), 2, order="rounds", seed=seed)
    ),
    "pairs": lambda _, seed: of_digits(ReturningTasks(SplitDigits(5, seed=seed), 2, seed=seed)),
    "unrelated": lambda _, seed: of_digits(SplitDigits(5, seed=seed)),
    "pacs": lambda data, seed: of_images("pacs", 7, partial(pacs, seed=seed), data),
    "caltech101": lambda data, seed: of_images(
        "caltech101", 28, partial(GroupedImageFolder, groups=CALTECH101_GROUPS, seed=seed), data
    ),
}

# ----------------------------------------------------------------------------- the uses of the pick


class Start(TaskStartPlugin):
    """The library's start, with other picks."""

    def __init__(self, pick: str, tree: AdapterTree, bank: AdapterBank, seed: int):
        super().__init__(tree, bank, seed=seed)
        self.pick = pick
        self._generator = torch.Generator().manual_seed(seed)

    def nearest(self, signature: Tensor) -> int:
        """The pick."""
        n = len(self.signatures)
        if self.pick == "random":
            return int(torch.randint(n, (), generator=self._generator))
        if self.pick == "tree":
            return descend(AdapterTree.build(torch.stack(self.signatures)), signature)[0]
        return n - 1 if self.pick == "last" else super().nearest(signature)


class InitialStart(SupervisedPlugin):
    """Every task begins at the initial factors."""

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Goes there, but for the first task, which stands there."""
        if strategy.clock.train_exp_epochs == 0:
            stack = LoRAFactors(strategy.model).stack
            if strategy.clock.train_exp_counter == 0:
                self._initial = stack.clone()
            stack.copy_(self._initial)
            strategy.optimizer.state.clear()


class NodeAdapters(SupervisedPlugin):
    """Layer by layer the mean over ever smaller groups of tasks, down to the task itself.

    :param start: has the signatures; comes before this plugin, and what files the adapter after.
    """

    def __init__(self, start: Start):
        super().__init__()
        self.start = start
        self.learned: list[Tensor] = []

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Takes the means along the path of the task just learned."""
        stack = LoRAFactors(strategy.model).stack
        self.learned.append(stack.clone())
        node = AdapterTree.build(torch.stack(self.start.signatures)).root
        for layer in range(len(stack)):
            stack[layer] = torch.stack([self.learned[k][layer] for k in node.members]).mean(0)
            for child in node.children or ():
                if len(self.learned) - 1 in child.members:
                    node = child


class LastSelector(SelectorPlugin):
    """Points at the most recent adapter."""

    def _start_search(self, strategy: Any) -> None:
        n_adapters, n_layers, _ = self._signatures.shape
        self._last = torch.full((n_layers,), n_adapters - 1, device=self._signatures.device)

    def _select(self) -> Tensor:
        return self._last


SELECTORS: dict[str, type[SelectorPlugin]] = {
    "tree": LCBSelectorPlugin,
    "nearest": NearestSelectorPlugin,
    "random": RandomSelectorPlugin,
    "last": LastSelector,
}


class Routed(SeqLoRA):
    """Plain LoRA that keeps every task's adapter and routes samples to them."""

    bank: AdapterBank

    def _view(self, model: nn.Module) -> TrainableView:
        return RoutedAdapters(model, self.bank)


class Curve(SupervisedPlugin):
    """How well the task that is learned is known, before its first step and after every epoch.

    :param tests: inputs and targets of every task.
    :param measure: what is known of a task, of the strategy and the task's test.
    """

    def __init__(self, tests: Sequence[Sequence[Tensor]], measure: Callable[..., float]):
        super().__init__()
        self.tests = tests
        self.measure = measure
        self.curves: list[list[float]] = []

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """The start."""
        if strategy.clock.train_exp_epochs == 0:
            self.curves.append([self._measured(strategy)])

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """An epoch."""
        self.curves[-1].append(self._measured(strategy))

    def _measured(self, strategy: Any) -> float:
        return self.measure(strategy, *self.tests[strategy.clock.train_exp_counter])


def live_accuracy(strategy: Any, images: Tensor, targets: Tensor) -> float:
    """Of the live adapter, among the classes of the task."""
    with evaluating(strategy.model):
        logits = torch.cat([strategy.model.forward_active(batch) for batch in images.split(256)])
    classes = targets.unique()
    return accuracy(classes[logits[:, classes].argmax(1)], targets)


def accuracy(predicted: Tensor, targets: Tensor) -> float:
    """In percent."""
    return 100 * (predicted == targets).float().mean().item()


def make(
    use: str, pick: str, stream: Stream, curve: Curve, seed: int, **training: Any
) -> tuple[SeqLoRA, Start | None]:
    """A strategy with this use of this pick."""
    tree, bank = AdapterTree(), AdapterBank()
    plugins: list[SupervisedPlugin] = []
    strategy: type[SeqLoRA] = SeqLoRA
    start = None
    if use in STARTS and pick != "none":
        start = Start(pick, tree, bank, seed)
        plugins.append(start)
    elif use in ROUTED:
        plugins.append(InitialStart())
    if use == "nodes" and start is not None:
        plugins.append(NodeAdapters(start))
    plugins.append(TreeBuilderPlugin(tree, bank))
    if use in ("share", "both"):
        plugins.append(MergedAdapterPlugin())
    if use in ROUTED:
        plugins.append(RouterPlugin(tree, seed))
        strategy = type("Routed", (Routed,), {"bank": bank})
    if use not in STARTS and pick != "none":
        kind = SELECTORS[pick]
        selector = kind(tree, seed) if pick in ("tree", "random") else kind(tree)
        plugins += [selector, SparseUpdatePlugin(selector, bank, 0.5)]
    torch.manual_seed(seed)
    made = strategy(
        stream.model(), plugins=[*plugins, curve], head="task_adaptive", evaluator=None, **training
    )
    return made, start


# ---------------------------------------------------------------------------------- the measurement


class Outcome(NamedTuple):
    """One run: means over the tasks that have a related predecessor, and over the stream."""

    curve: Tensor  # (n_tasks, 1 + n_epochs), of these tasks
    final: float
    bwt: float
    own_group: float  # share of picks; not a number where nothing was picked
    chance: float
    probe: Tensor  # (n_tasks,), in epochs


def measure(use: str, pick: str, stream: Stream, seed: int, **training: Any) -> Outcome:
    """Trains on the stream."""
    tests = [one_batch(experience.dataset) for experience in stream.benchmark.test_stream]
    curve = Curve(tests, live_accuracy)
    strategy, start = make(use, pick, stream, curve, seed, **training)
    learned = []
    for task, experience in enumerate(stream.benchmark.train_stream):
        strategy.train(experience)
        learned.append(answered(strategy, *tests[task]))
    final = [answered(strategy, *test) for test in tests]
    counted, own_group, chance = recovery(stream.groups, start)
    sizes = torch.tensor([len(e.dataset) for e in stream.benchmark.train_stream])[counted]
    n_samples = start.n_samples if start is not None and pick in ("tree", "nearest") else 0
    return Outcome(
        torch.tensor(curve.curves)[counted],
        sum(final) / len(final),
        sum(a - b for a, b in zip(learned, final, strict=True)) / len(final),
        own_group,
        chance,
        sizes.clamp(max=n_samples) / (2 * sizes),
    )


def recovery(groups: list[str], start: Start | None) -> tuple[list[int], float, float]:
    """The tasks that come after one of their group, and whether they began in it.

    :param groups: of every task; where none comes twice, all tasks but the first are counted.
    :param start: where they began; None where nothing was picked.
    :return: the tasks; the share of them that began in their group, not a number where nothing was
        picked; and that of a random pick.
    """
    related = [i for i in range(len(groups)) if groups[i] in groups[:i]]
    counted = related or list(range(1, len(groups)))
    own_group = math.nan
    if start is not None:
        own_group = sum(groups[start.starts[i] or 0] == groups[i] for i in counted) / len(counted)
    chance = sum(groups[:i].count(groups[i]) / i for i in counted) / len(counted)
    return counted, own_group, chance


def one_batch(dataset: Any) -> list[Tensor]:
    """Inputs and targets of a test set."""
    return stack_samples(dataset, range(len(dataset)))


def answered(strategy: SeqLoRA, images: Tensor, targets: Tensor) -> float:
    """Class-incremental accuracy, by the strategy's own inference."""
    with evaluating(strategy.model):
        logits = torch.cat([strategy.model(batch) for batch in images.split(256)])
    return accuracy(logits.argmax(1), targets)


def epochs_to(target: Tensor, curve: Tensor) -> Tensor:
    """Epochs until a curve ``(n_tasks, 1 + n_epochs)`` reaches its target, interpolated."""
    needed = torch.full((len(curve),), float(curve.shape[1] - 1))
    for task, (goal, values) in enumerate(zip(target.tolist(), curve.tolist(), strict=True)):
        reached = next((i for i, value in enumerate(values) if value >= goal), None)
        if reached == 0:
            needed[task] = 0.0
        elif reached is not None:
            below, above = values[reached - 1], values[reached]
            needed[task] = reached - 1 + (goal - below) / (above - below)
    return needed


def interval(differences: list[float]) -> float:
    """Half-width of the 95% interval of the mean."""
    n = len(differences)
    if n < 2:
        return math.nan
    return float(student.ppf(0.975, n - 1) * torch.tensor(differences).std() / n**0.5)


NUMBERS: dict[str, Callable[[Outcome, Outcome], float]] = {
    "at once": lambda run, last: run.curve[:, 0].mean().item(),
    "1 epoch": lambda run, last: run.curve[:, 1].mean().item(),
    "all epochs": lambda run, last: run.curve[:, -1].mean().item(),
    "epochs": lambda run, last: (
        (epochs_to(last.curve[:, -1], run.curve) + run.probe)
        .clamp(max=run.curve.shape[1] - 1)
        .mean()
        .item()
    ),
    "epochs to 90%": lambda run, last: (
        (epochs_to(0.9 * last.curve[:, -1], run.curve) + run.probe)
        .clamp(max=run.curve.shape[1] - 1)
        .mean()
        .item()
    ),
    "final": lambda run, last: run.final,
    "Bwt": lambda run, last: run.bwt,
}


def report(name: str, use: str, runs: dict[str, list[Outcome]], epochs: int) -> None:
    """The table of one use on one stream."""
    table = Table(title=f"{name}, {use}: {len(runs['last'])} seeds, {epochs} epochs a task")
    for column in ("pick", *NUMBERS, "own group"):
        table.add_column(column, justify="left" if column == "pick" else "right")
    for pick, of_pick in runs.items():
        cells = []
        for number in NUMBERS:
            controls = None if pick == "last" else values_of(runs, "last", number)
            cells.append(beside(values_of(runs, pick, number), controls, digits=1))
        cells.append(shares([run.own_group for run in of_pick], [run.chance for run in of_pick]))
        table.add_row(pick, *cells)
    Console(width=140).print(table)


def beside(values: list[float], controls: list[float] | None, digits: int) -> str:
    """The mean over seeds, and half the width of the interval of the difference to controls."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if controls is None:
        return mean
    pairs = [a - b for a, b in zip(values, controls, strict=True)]
    return f"{mean} ± {interval(pairs):.{digits}f}"


def shares(own_group: list[float], chance: list[float]) -> str:
    """Means over seeds of the share of picks in the own group, and of that of random picks."""
    own = sum(own_group) / len(own_group)
    return "–" if math.isnan(own) else f"{own:.2f} ({sum(chance) / len(chance):.2f})"


def values_of(runs: dict[str, list[Outcome]], pick: str, number: str) -> list[float]:
    """One value per seed."""
    pairs = zip(runs[pick], runs["last"], strict=True)
    return [NUMBERS[number](one, last) for one, last in pairs]


def missed_targets(name: str, runs: dict[str, list[Outcome]], epochs: int) -> list[str]:
    """What the nearest start fails to show on a stream."""

    def gain(pick: str, other: str, number: str) -> tuple[float, float]:
        pairs = zip(values_of(runs, pick, number), values_of(runs, other, number), strict=True)
        differences = [a - b for a, b in pairs]
        return sum(differences) / len(differences), interval(differences)

    missed = []
    if name.startswith("unrelated"):
        for number in ("all epochs", "final"):
            difference, half = gain("nearest", "none", number)
            if difference < -half:
                missed.append(f"{name}: {number} {difference:.1f} ± {half:.1f} against none")
        return missed
    for pick in ("tree", "nearest"):
        for other in ("random", "last"):
            difference, half = gain(pick, other, "1 epoch")
            if not difference > half:
                missed.append(f"{name}: 1 epoch, {pick} {difference:.1f} ± {half:.1f} on {other}")
    needed = values_of(runs, "nearest", "epochs")
    if not sum(needed) / len(needed) <= epochs / 2:
        missed.append(f"{name}: {sum(needed) / len(needed):.1f} of {epochs} epochs")
    own = sum(run.own_group for run in runs["nearest"]) / len(runs["nearest"])
    chance = sum(run.chance for run in runs["nearest"]) / len(runs["nearest"])
    if not own >= 2 * chance:
        missed.append(f"{name}: own group {own:.2f}, chance {chance:.2f}")
    return missed


def draw(runs: dict[tuple[str, str], dict[str, list[Outcome]]], path: Path) -> None:
    """The curves of the first use: accuracy on a new task, against epochs with the signature's."""
    from matplotlib import pyplot

    first = next(iter(runs))[1]
    starts = {name: of_use for (name, use), of_use in runs.items() if use == first}
    figure, axes = pyplot.subplots(1, len(starts), figsize=(4.2 * len(starts), 3.4), squeeze=False)
    looks = {
        "nearest": ("nearest past task", "#1b6ca8", "-"),
        "random": ("random past task", "#d1812b", "--"),
        "last": ("most recent (carried on)", "#555555", "-"),
        "none": ("mean of all" if first == "share" else "initial factors", "#999999", ":"),
    }
    for axis, (name, of_use) in zip(axes[0], starts.items(), strict=True):
        for pick, (label, color, style) in looks.items():
            if pick not in of_use:
                continue
            curve = torch.stack([run.curve.mean(0) for run in of_use[pick]])
            at = torch.arange(curve.shape[1]) + of_use[pick][0].probe.mean()
            axis.plot(at, curve.mean(0), style, color=color, label=label, linewidth=1.8)
            low, high = curve.min(0).values, curve.max(0).values
            axis.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set_title(name)
        axis.set_xlabel("epochs on the new task, signature included")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("accuracy on the new task, %")
    axes[0][-1].legend(frameon=False, loc="lower right", title="it starts from the adapter of the")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------ the run


def transfer(
    streams: tuple[str, ...] = ("domains", "pairs", "unrelated"),
    uses: tuple[str, ...] = ("share",),
    picks: tuple[str, ...] = PICKS,
    seeds: int = 3,
    epochs: int = 4,
    batch_size: int = 16,
    lr: float = 0.003,
    data: str = DATA,
    figure: str | None = None,
) -> list[str]:
    """Trains on the streams with every use of every pick.

    :param streams: domains, returning, pairs, unrelated, pacs, caltech101.
    :param uses: start, nodes, share, pull, both.
    :param picks: tree, nearest, random, last, none; ``last`` is always there.
    :param seeds: number of orders of each stream.
    :param epochs: epochs per task.
    :param batch_size: images per step.
    :param lr: learning rate of Adam.
    :param data: folder with ``pacs``, ``caltech101`` and the weights of DeiT-Tiny.
    :param figure: where to draw the curves of the first use, a PNG file.
    :return: the targets that were missed.
    """
    warnings.simplefilter("ignore")
    for name in streams:
        check_known("`streams`", name, STREAMS)
    for use in uses:
        check_known("`uses`", use, USES)
    missed: list[str] = []
    everything: dict[tuple[str, str], dict[str, list[Outcome]]] = {}
    for name in streams:
        for use in uses:
            runs: dict[str, list[Outcome]] = {pick: [] for pick in dict.fromkeys((*picks, "last"))}
            began = time.perf_counter()
            try:
                for seed in range(seeds):
                    stream = STREAMS[name](Path(data), seed)
                    for pick, outcomes in runs.items():
                        training = {
                            "optimizer": partial(torch.optim.Adam, lr=lr),
                            "train_mb_size": batch_size,
                            "train_epochs": epochs,
                            "eval_mb_size": 256,
                        }
                        outcomes.append(measure(use, pick, stream, seed, **training))
            except FileNotFoundError as error:
                print(f"{name}: skipped, {error}")
                break
            everything[name, use] = runs
            report(name, use, runs, epochs)
            print(f"({time.perf_counter() - began:.0f} s)", flush=True)
            if use in STARTS and set(PICKS) <= set(runs):
                missed += missed_targets(f"{name}, {use}", runs, epochs)
    if figure is not None:
        draw(everything, Path(figure))
    return missed


if __name__ == "__main__":
    run(transfer)
