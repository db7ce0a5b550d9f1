"""Accuracy and cost of three sketches of task signatures.

LoRA is trained on tasks of scikit-learn's digits (two classes each, every task from the same
start). The exact L1 distances between the tasks' displacement directions are compared with those of
three sketches: a fixed random sample of the coordinates (used by the library), sums of the
coordinates in buckets with random signs, and the median of absolute differences of Cauchy
projections.

    python benchmarks/signature_sketch.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from _command import new_table, run
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from treelora_avalanche.adapters import LayerShape, LoRAFactors, SignatureSketch
from treelora_avalanche.models import pretrained_digits_vit
from treelora_avalanche.scenarios import SplitDigits
from treelora_avalanche.strategies import SeqLoRA

Distances = Callable[[Tensor], Tensor]  # (n_tasks, n_layers, dim) -> (n_layers, n_tasks, n_tasks)


def displacements(class_orders: int, epochs: int) -> tuple[Tensor, list[LayerShape]]:
    """Returns the displacement of the adapter by each task, ``(n_tasks, n_layers, dim)``."""
    moved = []
    torch.manual_seed(0)
    strategy = SeqLoRA(
        pretrained_digits_vit(0), train_mb_size=32, train_epochs=epochs, evaluator=None
    )
    factors = LoRAFactors(strategy.model)
    start = {name: p.detach().clone() for name, p in strategy.model.named_parameters()}
    for seed in range(class_orders):
        for experience in SplitDigits(n_experiences=5, seed=seed).train_stream:
            with torch.no_grad():
                for name, parameter in strategy.model.named_parameters():
                    parameter.copy_(start[name])
            before = factors.stack.clone()
            strategy.train(experience, reset_optimizer_state=True)
            moved.append(factors.stack - before)
    return torch.stack(moved), factors.shapes


def l1(rows: Tensor) -> Tensor:
    """Returns L1 distances between the directions of ``(n_tasks, n_layers, size)``, per layer."""
    rows = normalize(rows, p=1.0, dim=-1).transpose(0, 1)
    return torch.cdist(rows, rows, p=1.0)


def coordinate_sample(shapes: list[LayerShape], size: int) -> Distances:
    """Returns the distances of the library's sketch."""
    sketch = SignatureSketch(shapes, size)
    return lambda moved: l1(torch.stack([sketch(task) for task in moved]))


def bucket_sums(shapes: list[LayerShape], size: int) -> Distances:
    """Returns the distances of sums of every ``size``-th coordinate, with random signs."""
    dim = max(shape.size for shape in shapes)
    padded = -(-dim // size) * size
    signs = torch.randint(2, (padded,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1

    def distances(moved: Tensor) -> Tensor:
        moved = torch.nn.functional.pad(moved, (0, padded - dim)) * signs
        return l1(moved.unflatten(-1, (-1, size)).sum(-2))

    return distances


def cauchy_median(shapes: list[LayerShape], size: int) -> Distances:
    """Returns the distances of Cauchy projections, whose absolute median estimates the norm."""
    dim = max(shape.size for shape in shapes)
    generator = torch.Generator().manual_seed(0)
    projection = torch.empty(dim, size).cauchy_(generator=generator)

    def distances(moved: Tensor) -> Tensor:
        rows = (moved @ projection).transpose(0, 1)  # (n_layers, n_tasks, size)
        rows = rows / rows.abs().median(-1, keepdim=True).values
        return (rows[:, :, None] - rows[:, None]).abs().median(-1).values

    return distances


def signature_sketch(
    sizes: tuple[int, ...] = (64, 256, 1024), class_orders: int = 4, epochs: int = 4
) -> list[str]:
    """Compares the sketches.

    :param sizes: numbers per layer.
    :param class_orders: number of random class orders, five tasks each.
    :param epochs: epochs per task.
    :return: an empty list: there is no target.
    """
    moved, shapes = displacements(class_orders, epochs)
    n_tasks, n_layers, dim = moved.shape
    exact = l1(moved)
    off = ~torch.eye(n_tasks, dtype=torch.bool).expand_as(exact)
    infinite = torch.where(off, 0.0, torch.inf)
    nearest = (exact + infinite).argmin(-1)

    table = new_table(
        f"{n_tasks} tasks, {n_layers} layers of {dim} values",
        ("sketch", "numbers", "correlation", "nearest agrees", "ms for all tasks"),
    )
    table.columns[0].no_wrap = True
    for make in (coordinate_sample, bucket_sums, cauchy_median):
        for size in sizes:
            distances = make(shapes, size)
            start = time.perf_counter()
            sketched = distances(moved)
            elapsed = 1e3 * (time.perf_counter() - start)
            correlation = torch.corrcoef(torch.stack((exact[off], sketched[off])))[0, 1]
            agrees = ((sketched + infinite).argmin(-1) == nearest).float().mean()
            table.add_row(
                make.__name__.replace("_", " "),
                str(size),
                f"{correlation:.3f}",
                f"{agrees:.2f}",
                f"{elapsed:.2f}",
            )
    Console().print(table)
    return []


if __name__ == "__main__":
    run(signature_sketch)
