"""Where to begin with a text task: at the most similar past one, or at another?

O-LoRA's text classifications in three groups, sentiment, topic and inference
(:data:`~treelora_avalanche.scenarios.TEXT_GROUPS`), in random order, learned by a small language
model. As in the use ``share`` of ``transfer.py``: a task begins at the adapter of the picked task,
and the mean of all tasks' adapters, that of the tree's root, answers in the end; there is no pull.

Picks: ``nearest``, by the signature of :class:`~treelora_avalanche.plugins.TaskStartPlugin`;
``random``; ``last``, the most recent task; ``none``, the mean of all.

A model of this size hardly tells one label from another, so what is measured is the loss on the
test texts' answers, in nats per token (lower is better): of the live adapter on the task that is
learned, before the first step (``at once``) and after each epoch, over the tasks that come after
one of their group; and of the mean over all tasks, after the last (``final``). ``own group`` is the
share of picks that are of the task's group, and in brackets that of a random pick. ``±`` is the
half-width of the 95% interval of the *paired difference* to ``last`` over seeds.

    python benchmarks/transfer_text.py
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _command import run
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transfer import DATA, Curve, Start, beside, one_batch, recovery, shares

from treelora_avalanche.adapters import AdapterBank
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models import TokenCrossEntropy, create_language_model
from treelora_avalanche.plugins import MergedAdapterPlugin, TreeBuilderPlugin
from treelora_avalanche.scenarios import GroupedTexts
from treelora_avalanche.strategies import SeqLoRA
from treelora_avalanche.tree import AdapterTree

PICKS = ("nearest", "random", "last", "none")


def answer_loss(strategy: Any, tokens: Tensor, targets: Tensor) -> float:
    """Nats per token of the answers, under the live adapter."""
    with evaluating(strategy.model):
        return float(TokenCrossEntropy()(strategy.model(tokens), targets))


def learn(
    pick: str, folder: Path, model: Path, seed: int, limit: int, **training: Any
) -> list[float]:
    """Losses at once, after every epoch, and final; the share of picks in the group, and chance."""
    language_model = create_language_model(model, max_length=480)
    stream = GroupedTexts(folder, language_model, limit=limit, seed=seed)
    tests = [one_batch(experience.dataset) for experience in stream.test_stream]
    tree, bank, curve = AdapterTree(), AdapterBank(), Curve(tests, answer_loss)
    start = None if pick == "none" else Start(pick, tree, bank, seed)
    starts = [] if start is None else [start]
    torch.manual_seed(seed)
    strategy = SeqLoRA(
        language_model,
        plugins=[TreeBuilderPlugin(tree, bank), MergedAdapterPlugin(), *starts, curve],
        evaluator=None,
        **training,
    )
    for experience in stream.train_stream:
        strategy.train(experience)
    counted, own_group, chance = recovery(stream.groups, start)
    curves = torch.tensor(curve.curves)[counted].mean(0)
    final = sum(answer_loss(strategy, *test) for test in tests) / len(tests)
    return [*curves.tolist(), final, own_group, chance]


def transfer_text(
    seeds: int = 3,
    epochs: int = 2,
    limit: int = 32,
    batch_size: int = 4,
    lr: float = 0.005,
    data: str = DATA,
    model: str | None = None,
) -> list[str]:
    """Trains from every start, in turn.

    :param seeds: number of orders.
    :param epochs: epochs per task.
    :param limit: texts per task, for training and for testing.
    :param batch_size: texts per step.
    :param lr: learning rate of AdamW, falling along a cosine within each task.
    :param data: folder with ``CL_Benchmark`` and ``stories260K``.
    :param model: another language model than that.
    """
    warnings.simplefilter("ignore")
    folder, weights = Path(data) / "CL_Benchmark", Path(model or Path(data) / "stories260K")
    if not folder.is_dir() or not weights.is_dir():
        print(f"skipped: {folder} or {weights} is missing (set TREELORA_DATA)")
        return []
    found: dict[str, list[list[float]]] = {pick: [] for pick in PICKS}
    for seed in range(seeds):
        for pick, outcomes in found.items():
            training = {
                "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
                "train_mb_size": batch_size,
                "train_epochs": epochs,
                "eval_mb_size": 32,
            }
            outcomes.append(learn(pick, folder, weights, seed, limit, **training))
    columns = ["at once", *(f"epoch {i + 1}" for i in range(epochs)), "final"]
    table = Table("pick", *columns, "own group", title=f"{weights.name}, {seeds} orders")
    for pick, outcomes in found.items():
        *losses, own_group, chance = map(list, zip(*outcomes, strict=True))
        controls = [None] * len(losses) if pick == "last" else zip(*found["last"], strict=True)
        cells = [beside(*pair, digits=3) for pair in zip(losses, controls, strict=False)]
        table.add_row(pick, *cells, shares(own_group, chance))
    Console(width=120).print(table)
    return []


if __name__ == "__main__":
    run(transfer_text)
