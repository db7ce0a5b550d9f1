"""Cost of TreeLoRA's selection, pull and bookkeeping in a step, and its growth.

TreeLoRA's plugins on the adapter of a stack of linear layers, without forward and backward pass:
the search for a past task in every layer, the fetching of its factors, the running signature, and
the proximal step. The first decile of the steps is reported, since a step of this length is either
interrupted by other processes or not; the exponent is p of ``ms = size ** p``.

    python benchmarks/selection_cost.py --check
    python benchmarks/selection_cost.py --past '[8,64,512]'      # 4.3 GB of stored adapters
"""

from __future__ import annotations

import statistics
from types import SimpleNamespace

import torch
from _command import Clock, chosen_clock, clock_note, exponent, new_table, run, synchronize
from rich.console import Console
from rich.table import Table
from torch import nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, add_lora
from treelora_avalanche.plugins import LCBSelectorPlugin, SparseUpdatePlugin
from treelora_avalanche.tree import AdapterTree

WIDTH = 1024
TARGET_MS = 2.0
TARGET_EXPONENT = 0.12  # of the number of tasks: flat


class Stack(nn.Module):
    """Linear layers in numbered blocks.

    :param n_layers: number of blocks, one layer each.
    """

    def __init__(self, n_layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(WIDTH, WIDTH, bias=False)}) for _ in range(n_layers)
        )


def milliseconds_per_step(
    n_layers: int, rank: int, n_tasks: int, device: str, now: Clock, steps: int = 200
) -> float:
    """Returns the milliseconds of an undisturbed step, without the model's passes.

    :param n_layers: adapted layers of 1,024 inputs and outputs.
    :param rank: rank of the adapter, which has ``2048 * rank`` values per layer.
    :param n_tasks: past tasks.
    :param device: where the adapter is.
    :param now: returns seconds.
    :param steps: steps to measure.
    """
    torch.manual_seed(0)
    model = add_lora(Stack(n_layers), layers="all", rank=rank, alpha=rank).to(device)
    factors, tree, bank = LoRAFactors(model), AdapterTree(), AdapterBank()
    for _ in range(n_tasks):
        tree.insert(nn.functional.normalize(torch.randn(n_layers, 256), p=1.0, dim=1))
        factors.stack.normal_(std=0.01)
        bank.append(factors)
    selector = LCBSelectorPlugin(tree)
    pull = SparseUpdatePlugin(selector, bank, 0.5)
    strategy = SimpleNamespace(
        model=model,
        optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        train_epochs=1,
        dataloader=range(steps),
        clock=SimpleNamespace(train_exp_counter=n_tasks),
    )
    for plugin in (selector, pull):
        plugin.before_training_exp(strategy)
    times = []
    for _ in range(steps):
        factors.stack.add_(1e-4)  # the optimizer's step
        synchronize(device)
        start = now()
        for plugin in (selector, pull):
            plugin.before_forward(strategy)
        for plugin in (selector, pull):
            plugin.after_update(strategy)
        synchronize(device)
        times.append(1e3 * (now() - start))
    return statistics.quantiles(times[steps // 10 :], n=10)[0]


def selection_cost_table(
    past: tuple[int, ...], many: tuple[int, ...], device: str, cpu_time: bool
) -> tuple[Table, list[str]]:
    """Returns the table, and the missed targets.

    :param past: numbers of past tasks at 16 layers of 131,072 values.
    :param many: numbers of past tasks at 16 layers of 2,048 values.
    :param device: where the adapter is.
    :param cpu_time: see :func:`selection_cost`.
    """
    table = new_table(
        f"Selection, pull and bookkeeping alone, {device}{clock_note(cpu_time)}",
        ("what grows", "from ... to", "ms per step", "exponent"),
        n_left=4,
    )
    series = {
        "past tasks (16 layers x 131,072 values)": (past, lambda n: (16, 64, n)),
        "past tasks (16 layers x 2,048 values)": (many, lambda n: (16, 1, n)),
        "layers (131,072 values, 8 past tasks)": ((4, 8, 16), lambda n: (n, 64, 8)),
        "rank (16 layers, 8 past tasks)": ((8, 16, 32, 64), lambda n: (16, n, 8)),
    }
    missed = []
    for name, (sizes, setting) in series.items():
        times = [milliseconds_per_step(*setting(n), device, chosen_clock(cpu_time)) for n in sizes]
        slope = exponent(sizes, times)
        table.add_row(
            name,
            ", ".join(f"{n:,}" for n in sizes),
            ", ".join(f"{ms:.2f}" for ms in times),
            f"{slope:.2f}",
        )
        if sizes is past and max(times) > TARGET_MS:
            missed.append(f"a step's bookkeeping takes {max(times):.2f} ms, above {TARGET_MS}")
        if name.startswith("past tasks") and slope > TARGET_EXPONENT:
            missed.append(f"{name}: the exponent is {slope:.2f}, above {TARGET_EXPONENT}")
    return table, missed


def selection_cost(
    past: tuple[int, ...] = (8, 32, 128),
    many: tuple[int, ...] = (8, 128, 1024),
    device: str = "cpu",
    cpu_time: bool = False,
) -> list[str]:
    """Measures the cost of a step without the model's passes.

    :param past: numbers of past tasks at 16 layers of 131,072 values, 8.4 MB each.
    :param many: numbers of past tasks at 16 layers of 2,048 values.
    :param device: where the adapter is.
    :param cpu_time: whether to count the processor time of this process, see ``_command.py``.
    :return: the missed targets.
    """
    table, missed = selection_cost_table(past, many, device, cpu_time)
    Console(width=130).print(table)
    return missed


if __name__ == "__main__":
    run(selection_cost)
