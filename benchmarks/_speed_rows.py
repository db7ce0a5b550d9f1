"""Rows of the stream benchmark: strategies with their watches, and two references."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _command import Clock, synchronize
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn
from torch.utils.data import DataLoader

from treelora_avalanche.adapters import TrainableView, add_lora
from treelora_avalanche.metrics import AccuracyMatrix, overall_performance
from treelora_avalanche.plugins import FirstSessionPlugin
from treelora_avalanche.strategies import L2P, HiDeLoRA, SeqLoRA, TreeLoRAStrategy

BASE, EQUAL = "SeqLoRA, all layers", "TreeLoRA, all layers"
FASTEST, COMPILED = "... and bf16", "... and compiled"
FIRST_SESSION = "... and bf16, all layers in the first task"
FIRST_SESSION_6 = "... and bf16, all in the first task, then 6"
HIDE, HIDE_BF16 = "HiDeLoRA, first 5 layers", "HiDeLoRA, bf16"


def _plain(layers: str) -> Callable[[nn.Module], nn.Module]:
    """Returns a wrapper without any speed-up: timm's own forward pass."""
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


def _own_head(shared: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in shared.items() if name != "head"}


# Builds a strategy from a backbone and shared arguments; and the adapted blocks, for the limit.
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


class Watch(SupervisedPlugin):
    """Records the milliseconds of every step, and the seconds of every epoch.

    :param clock: returns seconds.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.steps: list[float] = []
        self.epochs: list[float] = []

    def _now(self, strategy: Any) -> float:
        synchronize(strategy.device)
        return self.clock()

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Starts the watch of an epoch."""
        self._epoch = self._now(strategy)

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stops the watch of an epoch."""
        self.epochs.append(self._now(strategy) - self._epoch)

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Starts the watch of a step."""
        self._step = self._now(strategy)

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stops the watch of a step."""
        self.steps.append(1e3 * (self._now(strategy) - self._step))


@dataclass
class Measured:
    """Measurements of one row."""

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
        """Median milliseconds of a step."""
        return statistics.median(self.watch.steps)

    @property
    def epoch(self) -> float:
        """Median seconds of an epoch."""
        return statistics.median(self.watch.epochs)


def build_row(
    name: str,
    vit: nn.Module,
    batch_size: int,
    epochs: int,
    lr: float,
    seed: int,
    device: torch.device,
    clock: Clock,
) -> Measured:
    """Returns a row that has not learned anything yet.

    :param name: a key of :data:`ROWS`.
    :param vit: its backbone.
    :param batch_size: images per step.
    :param epochs: epochs per task.
    :param lr: Adam's learning rate.
    :param seed: seed of the adapter.
    :param device: where to train.
    :param clock: returns seconds.
    """
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


def learn(row: Measured, experience: Any, test: list[Any]) -> None:
    """Trains a row on one task, and evaluates it on the tasks so far.

    :param row: the row.
    :param experience: the task.
    :param test: test experiences of the tasks so far.
    """
    device = row.strategy.device
    clock = row.watch.clock
    start = clock()
    row.strategy.train(experience)
    synchronize(device)
    trained = clock()
    row.strategy.eval(test)
    synchronize(device)
    row.train += trained - start
    row.eval += clock() - trained


def bare_loop(
    model: nn.Module, dataset: Any, batch_size: int, device: torch.device, clock: Clock
) -> float:
    """Returns the seconds of an epoch of a minimal PyTorch training loop.

    :param model: the model.
    :param dataset: a dataset of Avalanche.
    :param batch_size: images per step.
    :param device: where to train.
    :param clock: returns seconds.
    """
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.005)
    model.train()
    start = clock()
    for images, targets, *_ in DataLoader(dataset.train(), batch_size, shuffle=True):
        optimizer.zero_grad()
        logits = model(images.to(device))
        nn.functional.cross_entropy(logits, targets.to(device)).backward()
        optimizer.step()
    synchronize(device)
    return clock() - start


def limit(vit: Any, layers: str, images: torch.Tensor, clock: Clock) -> float:
    """Returns the milliseconds of a forward pass, and of a backward pass to the lowest adapter.

    :param vit: a timm ViT.
    :param layers: the adapted blocks.
    :param images: a batch.
    :param clock: returns seconds.
    """
    first = 0 if layers == "all" else len(vit.blocks) - int(layers.removeprefix("last:"))
    start = clock()
    with torch.no_grad():
        hidden = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block in vit.blocks[:first]:
            hidden = block(hidden)
    hidden.requires_grad_()
    for block in vit.blocks[first:]:
        hidden = block(hidden)
    vit.forward_head(vit.norm(hidden)).logsumexp(1).sum().backward()
    synchronize(images.device)
    return 1e3 * (clock() - start)
