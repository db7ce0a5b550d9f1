"""Overhead of TreeLoRA's training step over SeqLoRA's, by the number of past tasks.

Both strategies train the same layers of the same ViT on the same random images (speed does not
depend on the images). Their steps alternate in short bursts, so that a slow spell of the machine
affects all of them, and medians are compared.

    python benchmarks/step_overhead.py --check
"""

from __future__ import annotations

from _command import new_table, run
from _steps import random_stream, take_turns, watched, with_past_tasks
from rich.console import Console

from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

TARGET_AT_8 = 1.05
TARGET_512_OVER_8 = 1.03


def step_overhead(
    model: str = "deit_tiny_patch16_224",
    img_size: int = 112,
    batch_size: int = 32,
    past_tasks: tuple[int, ...] = (1, 8, 64, 512),
    rounds: int = 12,
    steps_per_round: int = 4,
    device: str = "cpu",
) -> list[str]:
    """Compares the steps of TreeLoRA and SeqLoRA.

    :param model: name of a timm ViT; its weights are random.
    :param img_size: pixels on a side.
    :param batch_size: images per step.
    :param past_tasks: numbers of past tasks of TreeLoRA.
    :param rounds: bursts of steps per strategy; the first is a warm-up.
    :param steps_per_round: steps per burst.
    :param device: where to train.
    :return: the missed targets.
    """
    experience = random_stream(1, batch_size * steps_per_round, img_size)[0]

    shared = (model, img_size, batch_size, device)
    rows = {"SeqLoRA": watched(SeqLoRA, *shared)}
    for n_tasks in past_tasks:
        strategy, watch = watched(TreeLoRAStrategy, *shared)
        rows[f"TreeLoRA, {n_tasks} past"] = (with_past_tasks(strategy, n_tasks), watch)

    medians = dict(zip(rows, take_turns(rows.values(), experience, rounds), strict=True))
    ratios = {name: median / medians["SeqLoRA"] for name, median in medians.items()}
    table = new_table(
        f"{model} at {img_size} px, batch {batch_size}, {device}",
        ("strategy", "ms/step (median)", "over SeqLoRA"),
    )
    for name, median in medians.items():
        table.add_row(name, f"{median:.2f}", f"{ratios[name]:.3f}")
    Console().print(table)

    missed = []
    at_8 = ratios.get("TreeLoRA, 8 past")
    at_512 = ratios.get("TreeLoRA, 512 past")
    if at_8 is not None and at_8 > TARGET_AT_8:
        missed.append(f"TreeLoRA over SeqLoRA at 8 tasks is {at_8:.3f}, above {TARGET_AT_8}")
    if at_8 is not None and at_512 is not None and at_512 / at_8 > TARGET_512_OVER_8:
        missed.append(f"512 over 8 tasks is {at_512 / at_8:.3f}, above {TARGET_512_OVER_8}")
    return missed


if __name__ == "__main__":
    run(step_overhead)
