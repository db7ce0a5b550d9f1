"""Start of a text task at the most similar past one, compared with other starts.

O-LoRA's text classifications in three groups, sentiment, topic and inference
(:data:`~treelora_avalanche.scenarios.TEXT_GROUPS`), in random order, learned by a small language
model. As in the use ``share`` of ``transfer.py``: a task starts at the adapter of the picked task,
and the final predictions use the mean of all task adapters, that of the tree's root; there is no
pull.

Picks: ``nearest``, by the signature of :class:`~treelora_avalanche.plugins.TaskStartPlugin`;
``random``; ``last``, the most recent task; ``none``, the mean of all.

A model of this size hardly distinguishes labels, so that the loss on the answers of the test texts
is measured, in nats per token (lower is better): of the active adapter on the current task, before
the first step (``at once``) and after each epoch, over the tasks that follow one of their group;
and of the mean over all tasks, after the last (``final``). ``own group`` is the share of picks that
are of the task's group, and in brackets that of a random pick. ``±`` is the half-width of the 95%
interval of the *paired difference* to ``last`` over seeds.

    python benchmarks/transfer_text.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from _command import DATA, new_table, run
from _transfer_methods import Curve, Start, one_batch, recovery
from _transfer_report import shares, with_interval
from rich.console import Console
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models import TokenCrossEntropy, create_language_model
from treelora_avalanche.plugins import MergedAdapterPlugin, TreeBuilderPlugin
from treelora_avalanche.scenarios import GroupedTexts
from treelora_avalanche.strategies import SeqLoRA
from treelora_avalanche.tree import AdapterTree

PICKS = ("nearest", "random", "last", "none")


def answer_loss(strategy: Any, tokens: Tensor, targets: Tensor) -> float:
    """Returns the nats per token of the answers, under the active adapter."""
    with evaluating(strategy.model):
        return float(TokenCrossEntropy()(strategy.model(tokens), targets))


def learn(
    pick: str, folder: Path, model: Path, seed: int, limit: int, **training: Any
) -> list[float]:
    """Returns the losses at once, after every epoch, and final; share of own group; and chance.

    :param pick: one of :data:`PICKS`.
    :param folder: the folder ``CL_Benchmark``.
    :param model: folder of the language model.
    :param seed: seed of the order, of the adapter and of random picks.
    :param limit: texts per task, for training and for testing.
    :param training: arguments of the strategy.
    """
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
    """Trains from every start.

    :param seeds: number of orders.
    :param epochs: epochs per task.
    :param limit: texts per task, for training and for testing.
    :param batch_size: texts per step.
    :param lr: learning rate of AdamW at the start of its cosine within each task.
    :param data: folder with ``CL_Benchmark`` and ``stories260K``.
    :param model: folder of another language model than ``stories260K``.
    :return: an empty list: there is no target.
    """
    folder, weights = Path(data) / "CL_Benchmark", Path(model or Path(data) / "stories260K")
    if not folder.is_dir() or not weights.is_dir():
        print(f"skipped: {folder} or {weights} is missing (set TREELORA_DATA)")
        return []
    training = {
        "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
        "train_mb_size": batch_size,
        "train_epochs": epochs,
        "eval_mb_size": 32,
    }
    found: dict[str, list[list[float]]] = {pick: [] for pick in PICKS}
    for seed in range(seeds):
        for pick, outcomes in found.items():
            outcomes.append(learn(pick, folder, weights, seed, limit, **training))
    columns = ["at once", *(f"epoch {i + 1}" for i in range(epochs)), "final"]
    table = new_table(f"{weights.name}, {seeds} orders", ("pick", *columns, "own group"))
    for pick, outcomes in found.items():
        *losses, own_group, chance = map(list, zip(*outcomes, strict=True))
        controls = [None] * len(losses) if pick == "last" else zip(*found["last"], strict=True)
        cells = [with_interval(*pair, digits=3) for pair in zip(losses, controls, strict=False)]
        table.add_row(pick, *cells, shares(own_group, chance))
    Console(width=120).print(table)
    return []


if __name__ == "__main__":
    run(transfer_text)
