"""Growth of TreeLoRA's step with the adapter and the sequence, compared with SeqLoRA's.

A ViT with random weights on random images, with eight past tasks. One factor grows at a time: the
adapted blocks, counted from the output; the rank; the tokens of an image. The steps of both methods
alternate in short bursts, and medians are compared; the exponent is p of ``ms = size ** p`` for
TreeLoRA. The growth with the past tasks is measured by ``selection_cost.py`` and
``long_stream.py``.

    python benchmarks/step_scaling.py
    python benchmarks/step_scaling.py --model vit_base_patch16_224 --batch_size 64 --device cuda
"""

from __future__ import annotations

from typing import Any

from _command import Clock, chosen_clock, clock_note, exponent, new_table, run
from _steps import StepTimes, random_stream, take_turns, watched, with_past_tasks
from rich.console import Console
from rich.table import Table

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
    """Returns the median step of TreeLoRA and of SeqLoRA.

    :param model: name of a timm ViT with patches of 16 pixels.
    :param batch_size: images per step.
    :param device: where to train.
    :param now: returns seconds.
    :param layers: adapted blocks, counted from the output.
    :param rank: rank of the adapter.
    :param side: patches on a side of the image.
    :param bursts: bursts of steps per method; the first is a warm-up.
    :param steps: steps per burst.
    """

    def make(kind: type[SeqLoRA]) -> tuple[Any, StepTimes]:
        shape = {"layers": f"last:{layers}", "rank": rank}
        return watched(kind, model, side * PATCH, batch_size, device, now, cache=None, **shape)

    tree, plain = make(TreeLoRAStrategy), make(SeqLoRA)
    with_past_tasks(tree[0], PAST)
    experience = random_stream(1, batch_size * steps, side * PATCH)[0]
    of_tree, of_plain = take_turns((tree, plain), experience, bursts)
    return of_tree, of_plain


def step_scaling_table(model: str, batch_size: int, device: str, cpu_time: bool) -> Table:
    """Returns the table; for the arguments see :func:`step_scaling`."""
    table = new_table(
        f"A step of TreeLoRA, {model}, batch {batch_size}, {device}{clock_note(cpu_time)}",
        ("what grows", "from ... to", "ms per step", "over SeqLoRA's", "exponent"),
        n_left=5,
    )
    now = chosen_clock(cpu_time)
    for name, (what, sizes) in SERIES.items():
        times = [milliseconds(model, batch_size, device, now, **{what: size}) for size in sizes]
        shown = [size**2 + 1 for size in sizes] if what == "side" else sizes
        table.add_row(
            name,
            ", ".join(str(size) for size in shown),
            ", ".join(f"{tree:.1f}" for tree, _ in times),
            ", ".join(f"{tree / plain:.2f}" for tree, plain in times),
            f"{exponent(shown, [tree for tree, _ in times]):.2f}",
        )
    return table


def step_scaling(
    model: str = "deit_tiny_patch16_224",
    batch_size: int = 8,
    device: str = "cpu",
    cpu_time: bool = False,
) -> list[str]:
    """Measures the growth of a step.

    :param model: name of a timm ViT with a class token and patches of 16 pixels.
    :param batch_size: images per step.
    :param device: where to train.
    :param cpu_time: whether to count the processor time of this process, see ``_command.py``.
    :return: an empty list: there is no target.
    """
    Console(width=130).print(step_scaling_table(model, batch_size, device, cpu_time))
    return []


if __name__ == "__main__":
    run(step_scaling)
