"""What training a language model costs beyond the model: the library, the padding, the loss.

Five tables: `strategy.train` against a bare loop over the same model and the same batches; batches
of similar length, padded to the longest, against batches padded to the maximum, on the lengths that
TRACE has; peak memory of the loss at Llama 3's vocabulary; what the frozen layers below the adapter
compute, kept or computed anew in every epoch; and, on a GPU, the step of TreeLoRA
against that of SeqLoRA for a Llama-3.2-1B with random weights. Needs `TRACE-Benchmark` and
`stories260K` in $TREELORA_DATA.

    python benchmarks/language_throughput.py --check
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from _command import run
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset
from avalanche.training.plugins import SupervisedPlugin
from rich.console import Console
from rich.table import Table
from step_overhead import StepTimes, with_past_tasks
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from treelora_avalanche.models import LanguageModel, TokenCrossEntropy, create_language_model
from treelora_avalanche.models.token_batches import collate_tokens, token_loader
from treelora_avalanche.models.tokenization import EncodedSample
from treelora_avalanche.scenarios import TRACE
from treelora_avalanche.scenarios.text_tasks import TokenRows, TokenTargets
from treelora_avalanche.scenarios.trace import TRACE_TASKS, trace_tasks
from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

DATA = Path(os.environ.get("TREELORA_DATA", "../shared/data"))
TARGET_OVER_BARE = 1.10
TARGET_PADDING = 2.0
TARGET_LOSS_MEMORY = 0.5
TARGET_KEPT = 2.0
TARGET_TREELORA = 1.02
LLAMA_3_2_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}
BATCH_SIZE = 4
MAX_LENGTH = 1024


def now(device: str) -> float:
    """The time, all work on the device done."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a table whose first column is text."""
    table = Table(title=title)
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


# --------------------------------------------------------------------------------------------------
# The library: strategy.train against a bare loop


class Batches(SupervisedPlugin):
    """Keeps the batches of an experience."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Forgets those of the experience before."""
        self.seen = []

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps one more."""
        self.seen.append((strategy.mb_x, strategy.mb_y))


def against_bare_loop(data: Path, samples: int, rounds: int, device: str) -> list[str]:
    """Seconds of an epoch by the strategy, and by five lines around the same batches."""
    model = create_language_model(data / "stories260K")
    stream = TRACE(data, model, tasks=["FOMC"], limit=samples).train_stream
    batches = Batches()
    strategy = SeqLoRA(model, train_mb_size=BATCH_SIZE, plugins=[batches], device=device)
    strategy.evaluator.loggers = []
    bare, criterion = copy.deepcopy(strategy.model), TokenCrossEntropy()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4)
    seconds: dict[str, list[float]] = {"bare loop": [], "strategy.train": []}
    for burst in range(rounds + 1):  # in turn, so that a slow spell of the machine hits both
        start = now(device)
        strategy.train(stream[0])
        trained = now(device)
        for x, y in batches.seen:
            optimizer.zero_grad()
            criterion(bare(x, last=y.shape[1]), y).backward()
            optimizer.step()
        if burst:  # the first is a warm-up
            seconds["strategy.train"].append(trained - start)
            seconds["bare loop"].append(now(device) - trained)
    tokens = sum(int((x >= 0).sum()) for x, _ in batches.seen)
    speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratio = statistics.median(
        a / b for a, b in zip(seconds["strategy.train"], seconds["bare loop"], strict=True)
    )
    show(
        f"Training stories260K on FOMC, {len(batches.seen)} steps of {BATCH_SIZE}, {device}",
        ("", "tokens/s", "time over bare"),
        [
            ("bare loop", f"{speeds['bare loop']:.0f}", "1.000"),
            ("strategy.train", f"{speeds['strategy.train']:.0f}", f"{ratio:.3f}"),
        ],
    )
    if ratio > TARGET_OVER_BARE:
        return [f"strategy.train over a bare loop is {ratio:.3f}, above {TARGET_OVER_BARE}"]
    return []


# --------------------------------------------------------------------------------------------------
# The padding


def tokenizer_of(data: Path, texts_per_task: int = 60) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of TRACE's own texts, whose lengths are those of a large model's.

    That of stories260K has 512 tokens, and cuts text almost into letters.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = [
        record
        for task in trace_tasks(data, "500", TRACE_TASKS)
        for record in task.train.records[:texts_per_task]
    ]
    tokenizer.train_from_iterator((f"{r.prompt}{r.answer}"[:4000] for r in records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def padding(data: Path, samples: int, device: str) -> list[str]:
    """Tokens per second over TRACE's eight tasks, by how batches are made and padded."""
    tokenizer = tokenizer_of(data)
    stream = TRACE(data, tokenizer, limit=samples, max_length=MAX_LENGTH).train_stream
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
    )
    network = AutoModelForCausalLM.from_config(config).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    criterion = TokenCrossEntropy()

    def step(batches: Iterator[Any]) -> float:
        start = now(device)
        x, y, *_ = next(batches)
        optimizer.zero_grad()
        logits = network(input_ids=x.clamp(min=0).to(device), use_cache=False).logits
        criterion(logits.transpose(1, 2), y.to(device)).backward()
        optimizer.step()
        return now(device) - start

    def plain(collate: Callable[[Any], Any]) -> Callable[[Any], Iterable[Any]]:
        return lambda dataset: DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=collate)

    ways = {
        "padded to the maximum": plain(default_collate),
        "padded to the longest of the batch": plain(collate_tokens),
        "similar lengths, padded to the longest": lambda dataset: token_loader(
            dataset, BATCH_SIZE, shuffle=True
        ),
    }
    lengths = [length for e in stream for length in e.dataset.lengths]
    step(iter(ways["padded to the longest of the batch"](stream[0].dataset)))  # a warm-up
    seconds = dict.fromkeys(ways, 0.0)
    for experience in stream:
        loaders = {name: make(experience.dataset) for name, make in ways.items()}
        batches = {name: iter(loader) for name, loader in loaders.items()}
        for _ in range(math.ceil(len(experience.dataset) / BATCH_SIZE)):
            for name in ways:  # in turn, so that a slow spell of the machine hits all
                seconds[name] += step(batches[name])
    speed = {name: sum(lengths) / total for name, total in seconds.items()}
    slowest = speed["padded to the maximum"]
    show(
        f"TRACE's eight tasks, {samples} samples each, median {statistics.median(lengths):.0f} "
        f"tokens, at most {MAX_LENGTH}; batches of {BATCH_SIZE}, {device}",
        ("batches", "tokens/s", "faster"),
        [(name, f"{value:.0f}", f"{value / slowest:.2f} x") for name, value in speed.items()],
    )
    ratio = speed["similar lengths, padded to the longest"] / slowest
    if ratio < TARGET_PADDING:
        return [f"similar lengths are {ratio:.2f} times faster, fewer than {TARGET_PADDING}"]
    return []


# --------------------------------------------------------------------------------------------------
# The loss


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Most memory that a piece of work takes beyond what there was before it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    process, done = psutil.Process(), threading.Event()
    before = largest = process.memory_info().rss

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.001):
            largest = max(largest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return largest - before


def loss_memory(device: str, n_tokens: int = 512) -> list[str]:
    """Peak memory of a loss and its gradient, the logits not counted."""
    shape = (1, LLAMA_3_2_1B["vocab_size"], n_tokens)
    targets = torch.randint(shape[1], (1, n_tokens), device=device)
    logits = torch.zeros(1, n_tokens, shape[1], dtype=torch.bfloat16, device=device)
    logits = logits.normal_().transpose(1, 2).requires_grad_()

    def naive(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), targets)

    peaks = {}
    for name, loss in (("naive, in float32", naive), ("TokenCrossEntropy", TokenCrossEntropy())):
        peaks[name] = peak_bytes(lambda loss=loss: loss(logits, targets).backward(), device)
        logits.grad = None
    largest = peaks["naive, in float32"]
    size = logits.numel() * logits.element_size()
    show(
        f"Loss over {n_tokens} tokens, vocabulary {shape[1]:,}, bfloat16: beside {size / 1e6:.0f} "
        f"MB of logits, {device}",
        ("loss", "peak, MB", "of naive"),
        [(name, f"{peak / 1e6:.0f}", f"{peak / largest:.2f}") for name, peak in peaks.items()],
    )
    ratio = peaks["TokenCrossEntropy"] / largest
    if ratio > TARGET_LOSS_MEMORY:
        return [f"TokenCrossEntropy needs {ratio:.2f} of naive memory, above {TARGET_LOSS_MEMORY}"]
    return []


# --------------------------------------------------------------------------------------------------
# The step of a large model


def random_rows(n_samples: int, length: int, n_answer: int, vocabulary: int) -> Any:
    """One experience of random tokens, all samples of one length."""
    rows = torch.randint(vocabulary, (n_samples, length + 1)).tolist()
    samples = [EncodedSample(row, length + 1 - n_answer, 0) for row in rows]
    dataset = TaskAwareSupervisedClassificationDataset(
        [TokenRows(samples, length + 1)],
        data_attributes=[
            TokenTargets([tuple(s.tokens[s.n_prompt :]) for s in samples]),
            DataAttribute([length] * n_samples, "lengths"),
            DataAttribute([0] * n_samples, "targets_task_labels", use_in_getitem=True),
        ],
    )
    return with_task_labels(benchmark_from_datasets(train=[dataset])).train_stream[0]


def large_model_step(
    config: dict[str, Any], tokenizer: Any, rounds: int, n_answer: int, device: str
) -> list[str]:
    """Milliseconds and memory of the steps of SeqLoRA and TreeLoRA, in turn, on random weights."""
    experience = random_rows(8 * BATCH_SIZE, MAX_LENGTH, n_answer, config["vocab_size"])
    rows: dict[str, tuple[SeqLoRA, StepTimes]] = {}
    peaks: dict[str, int] = {}
    for name in ("SeqLoRA", "TreeLoRA, 8 past"):
        torch.manual_seed(0)
        with torch.device(device):
            network = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)
        watch = StepTimes()
        method = SeqLoRA if name == "SeqLoRA" else TreeLoRAStrategy
        strategy = method(
            LanguageModel(network, tokenizer, max_length=MAX_LENGTH + 1),
            train_mb_size=BATCH_SIZE,
            device=device,
            plugins=[watch],
            evaluator=None,
        )
        if isinstance(strategy, TreeLoRAStrategy):
            with_past_tasks(strategy, 8)
        rows[name] = (strategy, watch)
    for burst in range(rounds + 1):
        for name, (strategy, watch) in rows.items():
            peak = peak_bytes(lambda strategy=strategy: strategy.train(experience), device)
            peaks[name] = max(peak, peaks.get(name, 0))
            if burst == 0:
                watch.times.clear()
    medians = {name: statistics.median(watch.times) for name, (_, watch) in rows.items()}
    ratio = medians["TreeLoRA, 8 past"] / medians["SeqLoRA"]
    show(
        f"Llama-3.2-1B, random weights, bfloat16, {BATCH_SIZE} x {MAX_LENGTH} tokens, {n_answer} "
        f"of them answers, {device}",
        ("strategy", "ms/step (median)", "over SeqLoRA", "peak beside the weights, MB"),
        [
            (name, f"{ms:.2f}", f"{ms / medians['SeqLoRA']:.3f}", f"{peaks[name] / 1e6:.0f}")
            for name, ms in medians.items()
        ],
    )
    if ratio > TARGET_TREELORA:
        return [f"TreeLoRA over SeqLoRA is {ratio:.3f} per step, above {TARGET_TREELORA}"]
    return []


# --------------------------------------------------------------------------------------------------
# The frozen layers


def frozen_layers_kept(data: Path, samples: int, epochs: int, device: str) -> list[str]:
    """Processor time of tasks of a few epochs: all layers adapted, the last third, and kept."""
    tokenizer = tokenizer_of(data)
    stream = TRACE(
        data, tokenizer, tasks=["FOMC", "ScienceQA"], limit=samples, max_length=256
    ).train_stream
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    kinds: dict[str, dict[str, Any]] = {
        "all layers": {"layers": "all"},
        "last 4 layers": {"layers": "last:4", "cache": None},
        "... and frozen layers kept": {"layers": "last:4"},
    }
    strategies, learned = {}, {}
    for name, options in kinds.items():
        torch.manual_seed(0)
        model = LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer, max_length=256)
        strategies[name] = TreeLoRAStrategy(
            model,
            train_mb_size=BATCH_SIZE,
            train_epochs=epochs,
            device=device,
            evaluator=None,
            **options,
        )
    seconds = dict.fromkeys(kinds, 0.0)
    clock = time.process_time if device == "cpu" else lambda: now(device)
    for task, experience in enumerate(stream):
        for name, strategy in strategies.items():  # in turn, so that a slow spell hits all
            torch.manual_seed(task)
            start = clock()
            strategy.train(experience)
            seconds[name] += clock() - start
    for name, strategy in strategies.items():
        learned[name] = torch.cat([p.detach().flatten() for p in strategy.model.parameters()])
    slowest = seconds["all layers"]
    apart = learned["last 4 layers"] - learned["... and frozen layers kept"]
    show(
        f"TreeLoRA on two tasks of TRACE, {samples} samples each, {epochs} epochs, a Llama of 12 "
        f"layers with random weights; the weights with and without are at most "
        f"{float(apart.abs().max()):.0e} apart; {device}",
        ("adapted", "seconds" if device != "cpu" else "processor seconds", "faster"),
        [(name, f"{s:.1f}", f"{slowest / s:.2f} x") for name, s in seconds.items()],
    )
    ratio = slowest / seconds["... and frozen layers kept"]
    if ratio < TARGET_KEPT:
        return [f"with frozen layers kept it is {ratio:.2f} times faster, fewer than {TARGET_KEPT}"]
    return []


def language_throughput(
    data: Path = DATA,
    samples: int = 96,
    padding_samples: int = 16,
    rounds: int = 5,
    kept_samples: int = 24,
    kept_epochs: int = 5,
    answer_tokens: int = 128,
    device: str = "cpu",
) -> list[str]:
    """Measures all five.

    :param data: the folder that holds `TRACE-Benchmark` and `stories260K`.
    :param samples: samples of an epoch, where strategy and bare loop are compared.
    :param padding_samples: samples of each of TRACE's tasks, where ways of padding are compared.
    :param rounds: epochs of which the median is taken.
    :param kept_samples: samples of a task, where frozen layers are kept.
    :param kept_epochs: its epochs.
    :param answer_tokens: tokens with a loss in each sample of the large model.
    :param device: where to train; the large model is left out on a cpu.
    :return: the missed targets.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    missed = [
        *against_bare_loop(data, samples, rounds, device),
        *padding(data, padding_samples, device),
        *loss_memory(device),
        *frozen_layers_kept(data, kept_samples, kept_epochs, device),
    ]
    if device == "cpu":
        print("Llama-3.2-1B: skipped, for want of a GPU (--device cuda)")
    else:
        tokenizer = tokenizer_of(data)
        missed += large_model_step(LLAMA_3_2_1B, tokenizer, rounds, answer_tokens, device)
    return missed


if __name__ == "__main__":
    run(language_throughput)
