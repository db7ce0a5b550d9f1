"""Speed of training a language model: library overhead, padding, cached frozen layers."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from _command import print_table, synchronize
from avalanche.training.plugins import SupervisedPlugin
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from treelora_avalanche.models import LanguageModel, TokenCrossEntropy, create_language_model
from treelora_avalanche.models.token_batches import collate_tokens, token_loader
from treelora_avalanche.scenarios import TRACE
from treelora_avalanche.scenarios.trace import TRACE_TASKS, trace_tasks
from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

TARGET_OVER_BARE = 1.10
TARGET_PADDING = 2.0
TARGET_KEPT = 2.0
BATCH_SIZE = 4
MAX_LENGTH = 1024


def _now(device: str) -> float:
    """Returns the wall time after all work on the device."""
    synchronize(device)
    return time.perf_counter()


class Batches(SupervisedPlugin):
    """Keeps the batches of an experience."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Clears the batches of the previous experience."""
        self.seen = []

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps a batch."""
        self.seen.append((strategy.mb_x, strategy.mb_y))


def against_bare_loop(data: Path, samples: int, rounds: int, device: str) -> list[str]:
    """Compares an epoch of the strategy with a bare loop over the same batches.

    :param data: the folder that contains ``TRACE-Benchmark`` and ``stories260K``.
    :param samples: samples of the epoch.
    :param rounds: epochs of which the median is taken, after a warm-up.
    :param device: where to train.
    :return: the missed targets.
    """
    model = create_language_model(data / "stories260K")
    stream = TRACE(data, model, tasks=["FOMC"], limit=samples).train_stream
    batches = Batches()
    strategy = SeqLoRA(model, train_mb_size=BATCH_SIZE, plugins=[batches], device=device)
    strategy.evaluator.loggers = []
    bare, criterion = copy.deepcopy(strategy.model), TokenCrossEntropy()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4)
    seconds: dict[str, list[float]] = {"bare loop": [], "strategy.train": []}
    for burst in range(rounds + 1):  # in turn, so that a slow spell of the machine affects both
        start = _now(device)
        strategy.train(stream[0])
        trained = _now(device)
        for x, y in batches.seen:
            optimizer.zero_grad()
            criterion(bare(x, last=y.shape[1]), y).backward()
            optimizer.step()
        if burst:  # the first is a warm-up
            seconds["strategy.train"].append(trained - start)
            seconds["bare loop"].append(_now(device) - trained)
    tokens = sum(int((x >= 0).sum()) for x, _ in batches.seen)
    speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratio = statistics.median(
        a / b for a, b in zip(seconds["strategy.train"], seconds["bare loop"], strict=True)
    )
    print_table(
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


def trace_tokenizer(data: Path, texts_per_task: int = 60) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on TRACE, with the text lengths of a large model's.

    That of stories260K has 512 tokens, and splits text almost into letters.

    :param data: the folder that contains ``TRACE-Benchmark``.
    :param texts_per_task: records of each task to train it on.
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
    """Compares tokens per second over TRACE's eight tasks, by batching and padding.

    :param data: the folder that contains ``TRACE-Benchmark``.
    :param samples: samples of each task.
    :param device: where to train.
    :return: the missed targets.
    """
    tokenizer = trace_tokenizer(data)
    stream = TRACE(data, tokenizer, limit=samples, max_length=MAX_LENGTH).train_stream
    network = AutoModelForCausalLM.from_config(
        _small_llama(len(tokenizer), 64, 172, 2, MAX_LENGTH)
    ).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    criterion = TokenCrossEntropy()

    def step(batches: Iterator[Any]) -> float:
        start = _now(device)
        x, y, *_ = next(batches)
        optimizer.zero_grad()
        logits = network(input_ids=x.clamp(min=0).to(device), use_cache=False).logits
        criterion(logits.transpose(1, 2), y.to(device)).backward()
        optimizer.step()
        return _now(device) - start

    def plain(collate: Callable[[Any], Any]) -> Callable[[Any], Iterable[Any]]:
        return lambda dataset: DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=collate)

    loaders: dict[str, Callable[[Any], Iterable[Any]]] = {
        "padded to the maximum": plain(default_collate),
        "padded to the longest of the batch": plain(collate_tokens),
        "similar lengths, padded to the longest": lambda dataset: token_loader(
            dataset, BATCH_SIZE, shuffle=True
        ),
    }
    lengths = [length for e in stream for length in e.dataset.lengths]
    step(iter(loaders["padded to the longest of the batch"](stream[0].dataset)))  # a warm-up
    seconds = dict.fromkeys(loaders, 0.0)
    for experience in stream:
        built = {name: make(experience.dataset) for name, make in loaders.items()}
        batches = {name: iter(loader) for name, loader in built.items()}
        for _ in range(math.ceil(len(experience.dataset) / BATCH_SIZE)):
            for name in loaders:  # in turn, so that a slow spell of the machine affects all
                seconds[name] += step(batches[name])
    speed = {name: sum(lengths) / total for name, total in seconds.items()}
    slowest = speed["padded to the maximum"]
    print_table(
        f"TRACE's eight tasks, {samples} samples each, median {statistics.median(lengths):.0f} "
        f"tokens, at most {MAX_LENGTH}; batches of {BATCH_SIZE}, {device}",
        ("batches", "tokens/s", "faster"),
        [(name, f"{value:.0f}", f"{value / slowest:.2f} x") for name, value in speed.items()],
    )
    ratio = speed["similar lengths, padded to the longest"] / slowest
    if ratio < TARGET_PADDING:
        return [f"similar lengths are {ratio:.2f} times faster, below {TARGET_PADDING}"]
    return []


def frozen_layers_kept(data: Path, samples: int, epochs: int, device: str) -> list[str]:
    """Compares tasks of a few epochs: all layers adapted, the last third, and its cached prefix.

    :param data: the folder that contains ``TRACE-Benchmark``.
    :param samples: samples of each of two tasks.
    :param epochs: epochs per task.
    :param device: where to train; on a CPU processor time is counted.
    :return: the missed targets.
    """
    tokenizer = trace_tokenizer(data)
    stream = TRACE(
        data, tokenizer, tasks=["FOMC", "ScienceQA"], limit=samples, max_length=256
    ).train_stream
    config = _small_llama(len(tokenizer), 256, 688, 12, 256)
    kinds: dict[str, dict[str, Any]] = {
        "all layers": {"layers": "all"},
        "last 4 layers": {"layers": "last:4", "cache": None},
        "... and frozen layers kept": {"layers": "last:4"},
    }
    strategies = {}
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
    clock = time.process_time if device == "cpu" else lambda: _now(device)
    for task, experience in enumerate(stream):
        for name, strategy in strategies.items():  # in turn, so that a slow spell affects all
            torch.manual_seed(task)
            start = clock()
            strategy.train(experience)
            seconds[name] += clock() - start
    learned = {
        name: torch.cat([p.detach().flatten() for p in strategy.model.parameters()])
        for name, strategy in strategies.items()
    }
    slowest = seconds["all layers"]
    apart = learned["last 4 layers"] - learned["... and frozen layers kept"]
    print_table(
        f"TreeLoRA on two tasks of TRACE, {samples} samples each, {epochs} epochs, a Llama of 12 "
        f"layers with random weights; the weights with and without differ by at most "
        f"{float(apart.abs().max()):.0e}; {device}",
        ("adapted", "seconds" if device != "cpu" else "processor seconds", "faster"),
        [(name, f"{s:.1f}", f"{slowest / s:.2f} x") for name, s in seconds.items()],
    )
    ratio = slowest / seconds["... and frozen layers kept"]
    if ratio < TARGET_KEPT:
        return [f"with frozen layers kept it is {ratio:.2f} times faster, below {TARGET_KEPT}"]
    return []


def _small_llama(
    vocab_size: int, hidden_size: int, intermediate_size: int, n_layers: int, max_length: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max_length,
    )
