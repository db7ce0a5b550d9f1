"""Outcomes of transfer runs: tables over seeds, missed targets, and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from _command import new_table
from rich.console import Console
from scipy.stats import t as student
from torch import Tensor


class Outcome(NamedTuple):
    """Measurements of one run, over the tasks with a related predecessor or the whole stream."""

    curve: Tensor  # (n_tasks, 1 + n_epochs), of the tasks with a related predecessor
    final: float
    bwt: float
    own_group: float  # share of picks; NaN if nothing was picked
    chance: float
    probe: Tensor  # (n_tasks,), cost of the signature in epochs


Runs = dict[str, list[Outcome]]  # by pick, one per seed


def epochs_to(target: Tensor, curve: Tensor) -> Tensor:
    """Returns the epochs until each curve reaches its target, by linear interpolation.

    :param target: ``(n_tasks,)``.
    :param curve: ``(n_tasks, 1 + n_epochs)``; all epochs are counted if the target is not reached.
    """
    needed = torch.full((len(curve),), float(curve.shape[1] - 1))
    for task, (goal, values) in enumerate(zip(target.tolist(), curve.tolist(), strict=True)):
        reached = next((i for i, value in enumerate(values) if value >= goal), None)
        if reached == 0:
            needed[task] = 0.0
        elif reached is not None:
            below, above = values[reached - 1], values[reached]
            needed[task] = reached - 1 + (goal - below) / (above - below)
    return needed


def _mean_epochs(run: Outcome, last: Outcome, share: float) -> float:
    """Returns the epochs to a share of the final accuracy of ``last``, signature included."""
    needed = epochs_to(share * last.curve[:, -1], run.curve) + run.probe
    return needed.clamp(max=run.curve.shape[1] - 1).mean().item()


NUMBERS: dict[str, Callable[[Outcome, Outcome], float]] = {
    "at once": lambda run, last: run.curve[:, 0].mean().item(),
    "1 epoch": lambda run, last: run.curve[:, 1].mean().item(),
    "all epochs": lambda run, last: run.curve[:, -1].mean().item(),
    "epochs": lambda run, last: _mean_epochs(run, last, 1.0),
    "epochs to 90%": lambda run, last: _mean_epochs(run, last, 0.9),
    "final": lambda run, last: run.final,
    "Bwt": lambda run, last: run.bwt,
}
"""By column: the value of a run, given the run of the pick ``last`` at the same seed."""


def report(name: str, use: str, runs: Runs, epochs: int) -> None:
    """Prints the table of one use on one stream.

    :param name: the stream.
    :param use: the use.
    :param runs: the outcomes.
    :param epochs: epochs per task.
    """
    table = new_table(
        f"{name}, {use}: {len(runs['last'])} seeds, {epochs} epochs a task",
        ("pick", *NUMBERS, "own group"),
    )
    for pick, of_pick in runs.items():
        cells = []
        for number in NUMBERS:
            controls = None if pick == "last" else values_of(runs, "last", number)
            cells.append(with_interval(values_of(runs, pick, number), controls, digits=1))
        cells.append(shares([run.own_group for run in of_pick], [run.chance for run in of_pick]))
        table.add_row(pick, *cells)
    Console(width=140).print(table)


def with_interval(values: list[float], controls: list[float] | None, digits: int) -> str:
    """Returns the mean over seeds ± half-width of the interval of the difference to controls.

    :param values: one per seed.
    :param controls: one per seed; None for the mean alone.
    :param digits: decimals.
    """
    mean = f"{sum(values) / len(values):.{digits}f}"
    if controls is None:
        return mean
    pairs = [a - b for a, b in zip(values, controls, strict=True)]
    return f"{mean} ± {interval(pairs):.{digits}f}"


def interval(differences: list[float]) -> float:
    """Returns the half-width of the 95% interval of the mean."""
    n = len(differences)
    if n < 2:
        return math.nan
    return float(student.ppf(0.975, n - 1) * torch.tensor(differences).std() / n**0.5)


def shares(own_group: list[float], chance: list[float]) -> str:
    """Returns the mean share of picks in the own group, and in brackets that of random picks."""
    own = sum(own_group) / len(own_group)
    return "–" if math.isnan(own) else f"{own:.2f} ({sum(chance) / len(chance):.2f})"


def values_of(runs: Runs, pick: str, number: str) -> list[float]:
    """Returns one value per seed."""
    pairs = zip(runs[pick], runs["last"], strict=True)
    return [NUMBERS[number](one, last) for one, last in pairs]


def missed_targets(name: str, runs: Runs, epochs: int) -> list[str]:
    """Returns the missed targets of the nearest start on a stream.

    :param name: the stream.
    :param runs: the outcomes, of all picks.
    :param epochs: epochs per task.
    """

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


def draw(runs: dict[tuple[str, str], Runs], path: Path) -> None:
    """Draws the curves of the first use: accuracy on a new task over epochs.

    :param runs: the outcomes, by stream and use.
    :param path: a PNG file.
    """
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
