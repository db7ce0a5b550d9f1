"""TreeLoRA compared with plain LoRA on TRACE: Llama-3.2-1B-Instruct learns eight text tasks.

    python examples/trace_llama.py --data TRACE-Benchmark

takes a few hours on one GPU, and downloads the model from the Hugging Face hub (after its licence
is accepted there); any other causal language model works, by its name there or as a folder. A run
of minutes on a CPU, with a model too small to learn the tasks:

    python examples/trace_llama.py --model ../shared/data/stories260K --variant 500 --limit 64

Needs the release of TRACE (https://github.com/BeyonderXX/TRACE), by default in $TREELORA_DATA.
"""

from __future__ import annotations

import os
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from avalanche.training.plugins import EvaluationPlugin
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from treelora_avalanche import SeqLoRA, TreeLoRAStrategy
from treelora_avalanche.metrics import (
    EpochLoss,
    backward_transfer,
    generation_metrics,
    overall_performance,
)
from treelora_avalanche.models import create_language_model
from treelora_avalanche.scenarios import TRACE, TREELORA_EPOCHS

DATA = Path(os.environ.get("TREELORA_DATA", "../shared/data")) / "TRACE-Benchmark"
METHODS = {"SeqLoRA": SeqLoRA, "TreeLoRA": TreeLoRAStrategy}


def main(
    model: str = "meta-llama/Llama-3.2-1B-Instruct",
    data: Path = DATA,
    variant: str = "500",
    tasks: list[str] | None = None,
    limit: int | None = None,
    seeds: int = 1,
    batch_size: int = 4,
    eval_batch_size: int = 32,
    lr: float = 1e-4,
    max_length: int = 1024,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Trains both methods under the same budget: the epochs of the paper for TreeLoRA.

    :param model: folder of a causal language model, or its name on the hub.
    :param data: the folder TRACE-Benchmark.
    :param variant: samples per task: 500, 1000 or 5000.
    :param tasks: names of the tasks, in order of arrival; by default all eight.
    :param limit: number of records used of each file, from its start; None for all.
    :param seeds: number of seeds.
    :param batch_size: samples per step.
    :param eval_batch_size: prompts per batch of generation.
    :param lr: AdamW's learning rate at the start of its cosine; a tiny model needs a larger one.
    :param max_length: limit of the tokens of a prompt and its answer.
    :param device: where to train.
    """
    warnings.simplefilter("ignore")
    console = Console()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    names: list[str] = []
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in METHODS}
    minutes = dict.fromkeys(METHODS, 0.0)
    for seed in range(seeds):
        for name, method in METHODS.items():
            # LoRA is attached in place, so that each method needs its own model.
            language_model = create_language_model(model, dtype=dtype, max_length=max_length)
            benchmark = TRACE(data, language_model, variant, tasks=tasks, limit=limit)
            names = benchmark.task_names
            torch.manual_seed(seed)  # the same initial adapter and batches for every method
            scores, *others = generation_metrics()
            losses = EpochLoss()
            strategy = method(
                language_model,
                optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
                train_mb_size=batch_size,
                eval_mb_size=eval_batch_size,
                device=device,
                evaluator=EvaluationPlugin(scores, *others, losses, loggers=[]),
            )
            for experience in benchmark.train_stream:
                # The paper trains the tasks for different numbers of epochs.
                strategy.train_epochs = TREELORA_EPOCHS[experience.task_name]
                start = time.perf_counter()
                strategy.train(experience)
                minutes[name] += (time.perf_counter() - start) / 60
                strategy.eval(benchmark.test_stream[: strategy.clock.train_exp_counter])
                matrix = scores.matrix()
                console.print(
                    f"{name}, seed {seed}, after {experience.task_name}: training loss "
                    f"{losses.result():.2f}, Op {100 * overall_performance(matrix):.1f}",
                    highlight=False,
                )
                if isinstance(strategy, TreeLoRAStrategy):
                    console.print(strategy.tree.draw(names))
            rows[name].append(matrix)
    for name, matrices in rows.items():
        _print_matrix(console, name, names, 100 * torch.stack(matrices).mean(0))
    _print_table(console, f"{Path(model).name} on TRACE, {seeds} seed(s)", rows, minutes)


def _print_matrix(console: Console, method: str, names: list[str], matrix: torch.Tensor) -> None:
    table = Table(title=f"{method}: score on each task, %")
    table.add_column("after")
    for k in range(len(names)):
        table.add_column(str(k + 1), justify="right")
    for k, name in enumerate(names):
        table.add_row(f"{k + 1} {name}", *(f"{score:.1f}" for score in matrix[k, : k + 1].tolist()))
    console.print(table)


def _print_table(
    console: Console,
    title: str,
    rows: dict[str, list[torch.Tensor]],
    minutes: dict[str, float],
) -> None:
    table = Table(title=title)
    for column in ("method", "Op ↑, %", "Bwt ↓, %", "minutes of training"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, matrices in rows.items():
        cells = []
        for number in (overall_performance, backward_transfer):
            values = torch.tensor([100 * number(matrix) for matrix in matrices])
            cells.append(f"{values.mean():.1f} ± {values.std(correction=0):.1f}")
        table.add_row(name, *cells, f"{minutes[name] / len(matrices):.1f}")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main)
