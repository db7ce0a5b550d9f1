"""How a step of TreeLoRA grows with what is adapted and with the sequence, beside plain LoRA's.

A ViT with random weights on random images, with eight past tasks. One thing grows at a time: the
blocks with an adapter, counted from the output, its rank, the tokens of an image. The steps of both
methods alternate in short bursts, and what is compared are medians; the exponent is the slope of a
line fitted to the logarithms of TreeLoRA's time and of what grows. That it does not grow with the
past tasks is shown by ``selection_cost.py`` and ``long_stream.py``.

    python benchmarks/step_scaling.py
    python benchmarks/step_scaling.py --model vit_base_patch16_224 --batch_size 64 --device cuda
"""

from __future__ import annotations

import warnings
from typing import Any

from _command import Clock, chosen_clock, exponent, run
from rich.console import Console
from rich.table import Table
from step_overhead import StepTimes, random_stream, take_turns, watched, with_past_tasks

from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

PAST = 8
PATCH = 16
SERIES: dict[str, tuple[str, tuple[int, ...]]] = {
    "blocks with an adapter (50 tokens, rank 10)": ("layers", (1, 2, 4, 8, 12)),
    "rank (50 tokens, 5 blocks)": ("rank", (2, 8, 32, 128)),
    "tokens (5 blocks, rank 10)": ("side", (4, 7, 10, 14)),
}


def milliseconds(
    model: str,
    batch_size: int,
    device: str,
    now: Clock,
    *,
    layers: int = 5,
    rank: int = 10,
    side: int = 7,
    bursts: int = 4,
    steps: int = 3,
) -> tuple[float, float]:
    """Medians of a step of TreeLoRA and of SeqLoRA.

    :param model: name of a timm ViT with patches of 16 pixels.
    :param batch_size: images per step.
    :param device: where to train.
    :param now: seconds of some kind.
    :param layers: blocks with an adapter, counted from the output.
    :param rank: of the adapter.
    :param side: patches on a side of the image.
    :param bursts: of steps, per method; the first is not counted.
    :param steps: of a burst.
    """

    def make(kind: type[SeqLoRA]) -> tuple[Any, StepTimes]:
        shape = {"layers": f"last:{layers}", "rank": rank}
        return watched(kind, model, side * PATCH, batch_size, device, now, cache=None, **shape)

    ours, plain = make(TreeLoRAStrategy), make(SeqLoRA)
    with_past_tasks(ours[0], PAST)
    experience = random_stream(batch_size * steps, side * PATCH)[0]
    of_ours, of_plain = take_turns((ours, plain), experience, bursts)
    return of_ours, of_plain


def step_scaling_table(model: str, batch_size: int, device: str, cpu_time: bool) -> Table:
    """The table; see :func:`step_scaling`."""
    how = ", processor time" if cpu_time else ""
    table = Table(title=f"A step of TreeLoRA, {model}, batch {batch_size}, {device}{how}")
    for column in ("what grows", "from ... to", "ms per step", "over SeqLoRA's", "exponent"):
        table.add_column(column)
    now = chosen_clock(cpu_time)
    for name, (what, sizes) in SERIES.items():
        times = [milliseconds(model, batch_size, device, now, **{what: size}) for size in sizes]
        shown = [size**2 + 1 for size in sizes] if what == "side" else sizes
        table.add_row(
            name,
            ", ".join(str(size) for size in shown),
            ", ".join(f"{ours:.1f}" for ours, _ in times),
            ", ".join(f"{ours / plain:.2f}" for ours, plain in times),
            f"{exponent(shown, [ours for ours, _ in times]):.2f}",
        )
    return table


def step_scaling(
    model: str = "deit_tiny_patch16_224",
    batch_size: int = 8,
    device: str = "cpu",
    cpu_time: bool = False,
) -> list[str]:
    """Measures how a step grows.

    :param model: name of a timm ViT with a class token and patches of 16 pixels.
    :param batch_size: images per step.
    :param device: where to train.
    :param cpu_time: take the time that this process has had on the processor, see ``_command.py``.
    :return: nothing; no target is set.
    """
    warnings.simplefilter("ignore")
    warnings.showwarning = lambda *_, **__: None  # Avalanche sets filters of its own
    Console(width=130).print(step_scaling_table(model, batch_size, device, cpu_time))
    return []


if __name__ == "__main__":
    run(step_scaling)
