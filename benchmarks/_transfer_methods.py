"""Uses of the picked past task, and the controls that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _related_streams import Stream
from avalanche.training.plugins import SupervisedPlugin
from search_cost import descend
from torch import Tensor, nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, TrainableView
from treelora_avalanche.adapters.trainable_view import evaluating
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
from treelora_avalanche.strategies import SeqLoRA
from treelora_avalanche.tree import AdapterTree

USES = ("start", "nodes", "share", "pull", "both")
STARTS = ("start", "nodes", "share")
ROUTED = ("start", "nodes")
PICKS = ("tree", "nearest", "random", "last", "none")


class Start(TaskStartPlugin):
    """Starts each task at a past adapter, as the library does, with other picks.

    :param pick: tree, nearest, random or last.
    :param tree: the tree of the strategy.
    :param bank: the adapters of the strategy.
    :param seed: seed of random picks.
    """

    def __init__(self, pick: str, tree: AdapterTree, bank: AdapterBank, seed: int):
        super().__init__(tree, bank, seed=seed)
        self.pick = pick
        self._generator = torch.Generator().manual_seed(seed)

    def nearest(self, signature: Tensor) -> int:
        """Returns the picked past task."""
        n = len(self.signatures)
        if self.pick == "random":
            return int(torch.randint(n, (), generator=self._generator))
        if self.pick == "tree":
            return descend(AdapterTree.build(torch.stack(self.signatures)), signature)[0]
        return n - 1 if self.pick == "last" else super().nearest(signature)


class InitialStart(SupervisedPlugin):
    """Starts each task at the initial factors."""

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stores the factors before the first task, and restores them before the others."""
        if strategy.clock.train_exp_epochs == 0:
            stack = LoRAFactors(strategy.model).stack
            if strategy.clock.train_exp_counter == 0:
                self._initial = stack.clone()
            stack.copy_(self._initial)
            strategy.optimizer.state.clear()


class NodeAdapters(SupervisedPlugin):
    """Averages the adapter of a task layer by layer over ever smaller groups of tasks.

    :param start: has the signatures. It comes before this plugin, and the tree builder after.
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
    """Selects the most recent adapter."""

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
    """Plain LoRA that stores every task's adapter and routes samples to them."""

    bank: AdapterBank

    def _view(self, model: nn.Module) -> TrainableView:
        return RoutedAdapters(model, self.bank)


class Curve(SupervisedPlugin):
    """Measures the current task before its first step and after every epoch.

    :param tests: inputs and targets of every task.
    :param measure: called with the strategy and the test of the task.
    """

    def __init__(self, tests: Sequence[Sequence[Tensor]], measure: Callable[..., float]):
        super().__init__()
        self.tests = tests
        self.measure = measure
        self.curves: list[list[float]] = []

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Measures before the first step."""
        if strategy.clock.train_exp_epochs == 0:
            self.curves.append([self._measured(strategy)])

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Measures after an epoch."""
        self.curves[-1].append(self._measured(strategy))

    def _measured(self, strategy: Any) -> float:
        return self.measure(strategy, *self.tests[strategy.clock.train_exp_counter])


def build(
    use: str, pick: str, stream: Stream, curve: Curve, seed: int, **training: Any
) -> tuple[SeqLoRA, Start | None]:
    """Returns a strategy with a use of a pick, and its start if there is one.

    :param use: one of :data:`USES`.
    :param pick: one of :data:`PICKS`.
    :param stream: the stream to learn.
    :param curve: a plugin that measures.
    :param seed: seed of the model and of random picks.
    :param training: further arguments of the strategy.
    """
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
    built = strategy(
        stream.model(), plugins=[*plugins, curve], head="task_adaptive", evaluator=None, **training
    )
    return built, start


def active_accuracy(strategy: Any, images: Tensor, targets: Tensor) -> float:
    """Returns the accuracy of the active adapter, among the classes of the task, in percent."""
    with evaluating(strategy.model):
        logits = torch.cat([strategy.model.forward_active(batch) for batch in images.split(256)])
    classes = targets.unique()
    return _percent_correct(classes[logits[:, classes].argmax(1)], targets)


def inference_accuracy(strategy: SeqLoRA, images: Tensor, targets: Tensor) -> float:
    """Returns the class-incremental accuracy of the strategy's own inference, in percent."""
    with evaluating(strategy.model):
        logits = torch.cat([strategy.model(batch) for batch in images.split(256)])
    return _percent_correct(logits.argmax(1), targets)


def _percent_correct(predicted: Tensor, targets: Tensor) -> float:
    return 100 * (predicted == targets).float().mean().item()


def one_batch(dataset: Any) -> list[Tensor]:
    """Returns inputs and targets of a whole test set."""
    return stack_samples(dataset, range(len(dataset)))


def recovery(groups: list[str], start: Start | None) -> tuple[list[int], float, float]:
    """Returns the tasks that follow one of their group, and the share that started in it.

    :param groups: group of every task; if no group repeats, all tasks but the first are counted.
    :param start: the starts; None if nothing was picked.
    :return: the counted tasks; the share of them that started in their group, NaN if nothing was
        picked; and the expected share of a random pick.
    """
    related = [i for i in range(len(groups)) if groups[i] in groups[:i]]
    counted = related or list(range(1, len(groups)))
    own_group = math.nan
    if start is not None:
        own_group = sum(groups[start.starts[i] or 0] == groups[i] for i in counted) / len(counted)
    chance = sum(groups[:i].count(groups[i]) / i for i in counted) / len(counted)
    return counted, own_group, chance
