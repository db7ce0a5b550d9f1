"""Uses of the picked past task, compared with controls that pick without looking.

Streams with known relations:

* ``domains``: digits in four renditions, each coming twice (8 tasks, all classes in each);
* ``returning``: the same in rounds, A B C D A' B' C' D';
* ``pairs``: five pairs of digits, each coming twice (10 tasks of two classes);
* ``unrelated``: five pairs of digits, each once;
* ``pacs``: the four domains of PACS, each twice (8 tasks);
* ``caltech101``: mammals, vehicles, music; every task has four classes of its own (7 tasks).

Uses of the pick:

* ``start``: a task starts at the picked adapter. Every task stores its adapter, and at inference a
  sample is routed to one by class statistics; there is no pull.
* ``nodes``: as ``start``, and of every task's adapter the first layers are those of a large group
  of tasks and the last ones its own (Figure 2): layer l is the mean over the node of level l on
  the task's path through a tree of the signatures.
* ``share``: a task starts at the picked adapter; inference uses the mean of all task adapters, that
  of the tree's root; there is no pull.
* ``pull``: the paper's sparse update towards the picked adapter; inference uses the active adapter.
* ``both``: the pull; inference uses the mean, and every task starts there: the library's default
  if the head is task-adaptive.

Picks: ``tree``, found by descending the tree of signatures (``search_cost.py``; for the pull: by
the paper's LCB search); ``nearest``, the exact nearest by signature; ``random``; ``last``, the most
recent one; ``none``, for ``start`` the initial factors, for ``share`` the mean, for the pull none.
The signature is that of :class:`~treelora_avalanche.plugins.TaskStartPlugin`, for the pull that of
the paper.

``at once`` and ``1 epoch``: accuracy of the active adapter on the task's test images, among the
task's classes, before the first step and after one epoch; ``epochs``: until the accuracy that
``last`` has after all its epochs, including the signature, whose forward pass counts as half a
training sample each; all epochs if it is not reached. These are means over the tasks that follow
one of their group (on ``unrelated``: all but the first). ``final`` and ``Bwt``: accuracy over all
tasks after the last one, and backward transfer (positive is forgetting), both class-incremental.
``own group`` is the share of picks that are of the task's group, and in brackets that of a random
pick. ``±`` is the half-width of the 95% interval of the *paired difference* to ``last`` over seeds.

    python benchmarks/transfer.py --check
    python benchmarks/transfer.py --uses '[pull,both]' --streams '[domains,pairs]'
    python benchmarks/transfer.py --streams '[pacs]' --seeds 2 --epochs 2 --batch_size 32
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _command import DATA, run
from _related_streams import STREAMS, Stream
from _transfer_methods import (
    PICKS,
    STARTS,
    USES,
    Curve,
    active_accuracy,
    build,
    inference_accuracy,
    one_batch,
    recovery,
)
from _transfer_report import Outcome, Runs, draw, missed_targets, report

from treelora_avalanche.choices import check_known


def measure(use: str, pick: str, stream: Stream, seed: int, **training: Any) -> Outcome:
    """Trains on a stream with a use of a pick.

    :param use: one of the uses.
    :param pick: one of the picks.
    :param stream: the stream.
    :param seed: seed of the model and of random picks.
    :param training: arguments of the strategy.
    """
    tests = [one_batch(experience.dataset) for experience in stream.benchmark.test_stream]
    curve = Curve(tests, active_accuracy)
    strategy, start = build(use, pick, stream, curve, seed, **training)
    learned = []
    for task, experience in enumerate(stream.benchmark.train_stream):
        strategy.train(experience)
        learned.append(inference_accuracy(strategy, *tests[task]))
    final = [inference_accuracy(strategy, *test) for test in tests]
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
    :param picks: tree, nearest, random, last, none; ``last`` is always included.
    :param seeds: number of orders of each stream.
    :param epochs: epochs per task.
    :param batch_size: images per step.
    :param lr: learning rate of Adam.
    :param data: folder with ``pacs``, ``caltech101`` and the weights of DeiT-Tiny.
    :param figure: a PNG file into which the curves of the first use are drawn.
    :return: the missed targets.
    """
    for name in streams:
        check_known("`streams`", name, STREAMS)
    for use in uses:
        check_known("`uses`", use, USES)
    missed: list[str] = []
    everything: dict[tuple[str, str], Runs] = {}
    training = {
        "optimizer": partial(torch.optim.Adam, lr=lr),
        "train_mb_size": batch_size,
        "train_epochs": epochs,
        "eval_mb_size": 256,
    }
    for name in streams:
        for use in uses:
            runs: Runs = {pick: [] for pick in dict.fromkeys((*picks, "last"))}
            start = time.perf_counter()
            try:
                for seed in range(seeds):
                    stream = STREAMS[name](Path(data), seed)
                    for pick, outcomes in runs.items():
                        outcomes.append(measure(use, pick, stream, seed, **training))
            except FileNotFoundError as error:
                print(f"{name}: skipped, {error}")
                break
            everything[name, use] = runs
            report(name, use, runs, epochs)
            print(f"({time.perf_counter() - start:.0f} s)", flush=True)
            if use in STARTS and set(PICKS) <= set(runs):
                missed += missed_targets(f"{name}, {use}", runs, epochs)
    if figure is not None:
        draw(everything, Path(figure))
    return missed


if __name__ == "__main__":
    run(transfer)
