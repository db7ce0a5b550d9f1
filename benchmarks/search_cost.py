"""Cost of finding the nearest of N past tasks, and of routing images to one of N adapters.

Descent of the tree, compared with exhaustive search. Past tasks are drawn in groups of eight:
Gaussian around the centre of each group, with half the standard deviation of the centres.

* Search, once per task: signatures of 5 layers x 192 numbers. ``descent`` keeps the three best
  nodes of every level and compares the members of its last leaves; ``exact`` compares all.
  ``own group`` is the share of 20 searches that end in the group of the query.
* Routing, for every batch of images: 256 features of 192 numbers, one class per task. ``product``
  is the library's router, one matrix product with all classes
  (:class:`~treelora_avalanche.models.views.router.Router`); ``descent`` sends every image to the
  nearer child, level by level, all images of the batch together. ``own task`` is the share of
  images that are routed to their task.

The exponents are p of ``time = tasks ** p``, by least squares.

    python benchmarks/search_cost.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _command import exponent, run
from rich.console import Console
from rich.table import Table
from torch import Tensor

from treelora_avalanche.tree import AdapterTree, Node

LAYERS, DIM = 5, 192
GROUP = 8
REPEATS = 20


def descend(tree: AdapterTree, signature: Tensor, width: int = 3) -> tuple[int, int]:
    """Returns the nearest task in the leaves where a beam search ends.

    :param tree: the tree.
    :param signature: ``(n_layers, dim)``.
    :param width: nodes kept at every level: those with the smallest L1 distance, summed over the
        layers so far.
    :return: the adapter of the task, and the number of comparisons.
    """
    comparisons, leaves = 0, []
    kept: list[tuple[float, Node]] = [(0.0, tree.root)]
    while kept:
        candidates = []
        for distance, node in kept:
            if node.children is None:
                leaves.append(node)
                continue
            layer = signature[node.level]
            for child in node.children:
                candidates.append((distance + float((child.mean - layer).abs().sum()), child))
        comparisons += len(candidates)
        kept = sorted(candidates, key=lambda candidate: candidate[0])[:width]
    members = [member for leaf in leaves for member in leaf.members]
    distances = (tree.signatures[members] - signature).abs().sum((1, 2))
    return members[int(distances.argmin())], comparisons + len(members)


def tasks_in_groups(
    n: int, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws tasks ``(n, *shape)`` around the centres of their groups, which take turns."""
    centres = torch.randn(max(2, n // GROUP), *shape, generator=generator)
    noise = 0.5 * torch.randn(n, *shape, generator=generator)
    return centres[torch.arange(n) % len(centres)] + noise, centres


def milliseconds(what: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the result of a call, and its milliseconds."""
    start = time.perf_counter()
    result = what()
    return result, 1e3 * (time.perf_counter() - start)


def search(n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    """Returns comparisons and ms of a descent, ms of the exact search, share of own group."""
    signatures, centres = tasks_in_groups(n, (LAYERS, DIM), generator)
    tree = AdapterTree.build(signatures)
    tree.root  # noqa: B018 (brings the thresholds up to date)
    rows = []
    for _ in range(REPEATS):
        own = int(torch.randint(len(centres), (), generator=generator))
        query = centres[own] + 0.5 * torch.randn(LAYERS, DIM, generator=generator)
        (found, comparisons), descent = milliseconds(lambda query=query: descend(tree, query))
        _, exact = milliseconds(
            lambda query=query: (tree.signatures - query).abs().sum((1, 2)).argmin().item()
        )
        rows.append((comparisons, descent, exact, found % len(centres) == own))
    comparisons, descents, exacts, hits = zip(*rows, strict=True)
    return sum(comparisons) / REPEATS, median(descents), median(exacts), sum(hits) / REPEATS


def route(n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    """Returns ms of the product and of the descent, and the share of own task of each."""
    means, _ = tasks_in_groups(n, (DIM,), generator)
    own = torch.randint(n, (256,), generator=generator)
    features = means[own] + 0.2 * torch.randn(256, DIM, generator=generator)
    bias = -means.square().sum(1) / 2
    # Features have no layers, so that every level compares the same vector.
    tree = AdapterTree.build(means[:, None].expand(n, n.bit_length(), DIM))
    flat = tree.flatten()
    # Inner nodes are numbered after the arms, parents first; a leaf holds at most two tasks.
    groups = [node.members for node in tree.root.walk() if len(node.members) > 1]
    nodes = torch.stack([*means, *(means[members].mean(0) for members in groups)])
    rows = torch.arange(len(features))

    def by_descent() -> Tensor:
        at = torch.full((len(features),), flat.root)
        for _ in range(flat.height):
            children = flat.children[at]  # (256, 2)
            distances = (nodes[children] - features[:, None]).square().sum(-1)
            at = children[rows, distances.argmin(1)]
        return at

    products, descents = [], []
    for _ in range(REPEATS):
        chosen, spent = milliseconds(lambda: torch.addmm(bias, features, means.T).argmax(1))
        products.append(spent)
        descended, spent = milliseconds(by_descent)
        descents.append(spent)
    hits = [(by == own).float().mean().item() for by in (chosen, descended)]
    return median(products), median(descents), hits[0], hits[1]


def search_cost(sizes: tuple[int, ...] = (8, 64, 512, 4096)) -> list[str]:
    """Prints both tables.

    :param sizes: numbers of past tasks.
    """
    generator = torch.Generator().manual_seed(0)
    for title, measure, columns in (
        (
            f"a search, {LAYERS} layers of {DIM} numbers",
            search,
            ("descent: comparisons", "descent: ms", "exact: ms", "descent: own group"),
        ),
        (
            f"routing a batch of 256 features of {DIM} numbers",
            route,
            ("product: ms", "descent: ms", "product: own task", "descent: own task"),
        ),
    ):
        rows = [measure(n, generator) for n in sizes]
        table = Table("tasks", *columns, title=title)
        for n, row in zip(sizes, rows, strict=True):
            table.add_row(f"{n:,}", *(f"{value:.2f}" for value in row))
        exponents = (
            "" if "own" in name else f"{exponent(sizes, [row[i] for row in rows]):.2f}"
            for i, name in enumerate(columns)
        )
        table.add_row("exponent", *exponents)
        Console().print(table)
    return []


if __name__ == "__main__":
    run(search_cost)
