"""Cost of routed generation: its time over that of generation with one merged adapter.

Prompts of random tokens through a Llama with random weights of SmolLM2-135M's shape, in bfloat16,
and four stored adapters. The passes alternate, and medians are compared: one adapter for all
prompts, merged into the weights; routed, all prompts of a batch to one adapter; routed, to all
adapters in every batch. The router reads the hidden states below the lowest adapted layer.

    OMP_NUM_THREADS=1 python benchmarks/routed_generation.py --check --cpu_time true
"""

from __future__ import annotations

import statistics

import torch
from _command import chosen_clock, clock_note, new_table, run, synchronize
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, add_lora
from treelora_avalanche.models import LanguageModel
from treelora_avalanche.models.features.discriminant import Discriminant
from treelora_avalanche.models.views.prompt_router import PromptRouter
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel

TARGET_ONE, TARGET_MIXED = 1.1, 1.15
SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
N_TASKS = 4


def routed_generation(
    batch_size: int = 16,
    prompt_tokens: int = 100,
    new_tokens: int = 8,
    layers: str = "last:10",
    rounds: int = 6,
    cpu_time: bool = False,
    device: str = "cpu",
) -> list[str]:
    """Times the three ways.

    :param batch_size: prompts per pass.
    :param prompt_tokens: tokens of each prompt.
    :param new_tokens: generated tokens of each prompt.
    :param layers: adapted decoder layers.
    :param rounds: passes of each way; the first is a warm-up.
    :param cpu_time: whether to count processor time.
    :param device: where to compute.
    :return: the missed targets.
    """
    torch.manual_seed(0)
    view = _view(layers, device)
    prompts = torch.randint(1, SHAPE["vocab_size"], (batch_size, prompt_tokens)).tolist()
    features = view.frozen_features(torch.tensor(prompts, device=device)).cpu()
    router = PromptRouter(
        Discriminant.fit([features + k for k in range(N_TASKS)]),
        torch.arange(N_TASKS),
        tuple(range(N_TASKS)),
        tuple(map(str, range(N_TASKS))),
        threshold=torch.inf,
        spread=1.0,
    )
    # Means at every prompt, in turn, for a batch of all tasks.
    mixed = [features[k::N_TASKS] for k in range(N_TASKS)]
    ways = {
        "one adapter, merged": None,
        "routed, one task per batch": router._replace(adapter=torch.zeros(N_TASKS).long()),
        "routed, four tasks per batch": router._replace(discriminant=Discriminant.fit(mixed)),
    }
    clock = chosen_clock(cpu_time)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, chosen in ways.items():
            view.router = chosen and _on(chosen, device)
            start = clock()
            view.generate(prompts, new_tokens, batch_size)
            synchronize(device)
            times[way].append(1e3 * (clock() - start))
    medians = {way: statistics.median(values[1:]) for way, values in times.items()}
    first, one, many = medians.values()
    table = new_table(
        f"{batch_size} prompts of {prompt_tokens} tokens, {new_tokens} new ones, {layers} adapted, "
        f"{device}{clock_note(cpu_time)}",
        ("generation", "ms (median)", "over merged"),
    )
    for way, median in medians.items():
        table.add_row(way, f"{median:.0f}", f"{median / first:.3f}")
    Console().print(table)
    targets = ((one, TARGET_ONE, "one task"), (many, TARGET_MIXED, "four tasks"))
    return [
        f"routed generation of {what} over a merged adapter's is {time / first:.2f}, above {limit}"
        for time, limit, what in targets
        if time / first > limit
    ]


def _view(layers: str, device: str) -> RoutedLanguageModel:
    network = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>"
    )
    model = LanguageModel(network, tokenizer)
    bank = AdapterBank()
    view = RoutedLanguageModel(add_lora(model, layers=layers), bank).to(device).eval()
    factors = LoRAFactors(view)
    for _ in range(N_TASKS):
        factors.stack.normal_(std=0.01)
        bank.append(factors)
    return view


def _on(router: PromptRouter, device: str) -> PromptRouter:
    parts = (part.to(device) for part in router.discriminant)
    return router._replace(discriminant=Discriminant(*parts), adapter=router.adapter.to(device))


if __name__ == "__main__":
    run(routed_generation)
