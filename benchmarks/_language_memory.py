"""Memory of a language model's loss, and the step of a large model."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from _command import print_table
from _memory import peak_of_process
from _steps import StepTimes, with_past_tasks
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from treelora_avalanche.models import LanguageModel, TokenCrossEntropy
from treelora_avalanche.models.token_datasets import as_avalanche_dataset
from treelora_avalanche.models.tokenization import EncodedSample
from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

TARGET_LOSS_MEMORY = 0.5
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


def loss_memory(device: str, n_tokens: int = 512) -> list[str]:
    """Compares the peak memory of a loss and its gradient, without the logits.

    :param device: where to compute.
    :param n_tokens: tokens with a loss.
    :return: the missed targets.
    """
    shape = (1, LLAMA_3_2_1B["vocab_size"], n_tokens)
    targets = torch.randint(shape[1], (1, n_tokens), device=device)
    logits = torch.zeros(1, n_tokens, shape[1], dtype=torch.bfloat16, device=device)
    logits = logits.normal_().transpose(1, 2).requires_grad_()

    def naive(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), targets)

    peaks = {}
    for name, loss in (("naive, in float32", naive), ("TokenCrossEntropy", TokenCrossEntropy())):
        peaks[name] = peak_of_process(lambda loss=loss: loss(logits, targets).backward(), device)
        logits.grad = None
    largest = peaks["naive, in float32"]
    size = logits.numel() * logits.element_size()
    print_table(
        f"Loss over {n_tokens} tokens, vocabulary {shape[1]:,}, bfloat16: peak beyond "
        f"{size / 1e6:.0f} MB of logits, {device}",
        ("loss", "peak, MB", "of naive"),
        [(name, f"{peak / 1e6:.0f}", f"{peak / largest:.2f}") for name, peak in peaks.items()],
    )
    ratio = peaks["TokenCrossEntropy"] / largest
    if ratio > TARGET_LOSS_MEMORY:
        return [f"TokenCrossEntropy needs {ratio:.2f} of naive memory, above {TARGET_LOSS_MEMORY}"]
    return []


def random_tokens(n_samples: int, length: int, n_answer: int, vocabulary: int) -> Any:
    """Returns one experience of random token sequences of one length.

    :param n_samples: number of samples.
    :param length: tokens of a sample.
    :param n_answer: tokens with a loss, at its end.
    :param vocabulary: size of the vocabulary.
    """
    sequences = torch.randint(vocabulary, (n_samples, length + 1)).tolist()
    samples = [EncodedSample(tokens, length + 1 - n_answer, 0) for tokens in sequences]
    dataset = as_avalanche_dataset(samples, length + 1)
    return with_task_labels(benchmark_from_datasets(train=[dataset])).train_stream[0]


def large_model_step(
    config: dict[str, Any], tokenizer: Any, rounds: int, n_answer: int, device: str
) -> list[str]:
    """Compares the steps of SeqLoRA and TreeLoRA, in turn, on a model with random weights.

    :param config: arguments of the model's ``LlamaConfig``.
    :param tokenizer: a tokenizer of transformers.
    :param rounds: experiences of 8 steps of which the median is taken, after a warm-up.
    :param n_answer: tokens with a loss in each sample.
    :param device: where to train.
    :return: the missed targets.
    """
    experience = random_tokens(8 * BATCH_SIZE, MAX_LENGTH, n_answer, config["vocab_size"])
    rows: dict[str, tuple[SeqLoRA, StepTimes]] = {}
    peaks: dict[str, int] = {}
    for name in ("SeqLoRA", "TreeLoRA, 8 past"):
        torch.manual_seed(0)
        with torch.device(device):
            network = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)
        watch = StepTimes()
        # Routed by default, language models are not pulled towards past tasks.
        pulled = partial(TreeLoRAStrategy, inference="last")
        method = SeqLoRA if name == "SeqLoRA" else pulled
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
            peak = peak_of_process(lambda strategy=strategy: strategy.train(experience), device)
            peaks[name] = max(peak, peaks.get(name, 0))
            if burst == 0:
                watch.times.clear()
    medians = {name: statistics.median(watch.times) for name, (_, watch) in rows.items()}
    ratio = medians["TreeLoRA, 8 past"] / medians["SeqLoRA"]
    print_table(
        f"Llama-3.2-1B, random weights, bfloat16, {BATCH_SIZE} x {MAX_LENGTH} tokens, {n_answer} "
        f"of them with a loss, {device}",
        ("strategy", "ms/step (median)", "over SeqLoRA", "peak beyond the weights, MB"),
        [
            (name, f"{ms:.2f}", f"{ms / medians['SeqLoRA']:.3f}", f"{peaks[name] / 1e6:.0f}")
            for name, ms in medians.items()
        ],
    )
    if ratio > TARGET_TREELORA:
        return [f"TreeLoRA over SeqLoRA is {ratio:.3f} per step, above {TARGET_TREELORA}"]
    return []
