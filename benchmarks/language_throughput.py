"""Cost of training a language model beyond the model: library, padding, loss, frozen layers.

Five tables: `strategy.train` compared with a bare loop over the same model and the same batches;
batches of similar length, padded to the longest, compared with batches padded to the maximum, on
the text lengths of TRACE; peak memory of the loss at Llama 3's vocabulary; the output of the frozen
layers below the adapter, cached or recomputed in every epoch; and, on a GPU, the step of TreeLoRA
over that of SeqLoRA for a Llama-3.2-1B with random weights. Needs `TRACE-Benchmark` and
`stories260K` in $TREELORA_DATA.

    python benchmarks/language_throughput.py --check
"""

from __future__ import annotations

from pathlib import Path

import torch
from _command import DATA, run
from _language_memory import LLAMA_3_2_1B, large_model_step, loss_memory
from _language_speed import against_bare_loop, frozen_layers_kept, padding, trace_tokenizer


def language_throughput(
    data: Path = Path(DATA),
    samples: int = 96,
    padding_samples: int = 16,
    rounds: int = 5,
    kept_samples: int = 24,
    kept_epochs: int = 5,
    answer_tokens: int = 128,
    device: str = "cpu",
) -> list[str]:
    """Measures all five.

    :param data: the folder that contains `TRACE-Benchmark` and `stories260K`.
    :param samples: samples of the epoch that is compared with a bare loop.
    :param padding_samples: samples of each of TRACE's tasks in the comparison of padding.
    :param rounds: epochs of which the median is taken.
    :param kept_samples: samples of each task in the comparison of frozen layers.
    :param kept_epochs: epochs of each task in the comparison of frozen layers.
    :param answer_tokens: tokens with a loss in each sample of the large model.
    :param device: where to train; the large model is skipped on a CPU.
    :return: the missed targets.
    """
    torch.manual_seed(0)
    missed = [
        *against_bare_loop(data, samples, rounds, device),
        *padding(data, padding_samples, device),
        *loss_memory(device),
        *frozen_layers_kept(data, kept_samples, kept_epochs, device),
    ]
    if device == "cpu":
        print("Llama-3.2-1B: skipped, it needs a GPU (--device cuda)")
    else:
        tokenizer = trace_tokenizer(data)
        missed += large_model_step(LLAMA_3_2_1B, tokenizer, rounds, answer_tokens, device)
    return missed


if __name__ == "__main__":
    run(language_throughput)
