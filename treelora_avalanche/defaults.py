"""Default hyper-parameters for each kind of model, each written once.

The strategies, the adapters and the command line read them here. Nothing heavy is imported.
"""

from __future__ import annotations

from typing import NamedTuple


class LoRADefaults(NamedTuple):
    """Default LoRA hyper-parameters for one kind of model.

    :param rank: rank of the factors A ``(rank, in)`` and B ``(out, rank)``.
    :param alpha: the adapter's output is scaled by ``alpha / rank``.
    :param layers: adapted blocks, see :func:`~treelora_avalanche.adapters.find_adaptable_layers`.
    :param target_modules: sets of linear layers inside a block, one set per model family; the first
        set that a model has is adapted.
    """

    rank: int
    alpha: float
    layers: str
    target_modules: tuple[tuple[str, ...], ...]


class TrainingDefaults(NamedTuple):
    """Default training hyper-parameters for one kind of model.

    :param optimizer: class name in :mod:`torch.optim`.
    :param lr: learning rate.
    :param schedule: of the learning rate within an experience, ``"constant"`` or ``"cosine"``.
    :param train_mb_size: mini-batch size for training.
    :param train_epochs: epochs per experience.
    :param eval_mb_size: mini-batch size for evaluation.
    """

    optimizer: str
    lr: float
    schedule: str
    train_mb_size: int
    train_epochs: int
    eval_mb_size: int


VISION_LORA = LoRADefaults(10, 10, "first:5", (("qkv",), ("q_proj", "k_proj", "v_proj")))
"""timm's vision transformers; rank and scaling are HiDeLoRA's bottleneck."""

LANGUAGE_LORA = LoRADefaults(
    8,
    32,
    "all",
    (
        ("q_proj", "v_proj"),  # Llama, Mistral, Gemma, Qwen, OPT, GPT-J
        ("c_attn",),  # GPT-2: queries, keys and values in one
        ("query_key_value",),  # GPT-NeoX, Falcon, BLOOM
        ("qkv_proj",),  # Phi-3
    ),
)
"""Causal language models: queries and values, as in TreeLoRA (Table 4: 64 matrices of a
Llama-2-7B), with the rank and the scaling of TRACE."""

ENCODER_LORA = LoRADefaults(
    8,
    32,
    "all",
    (
        ("query", "value"),  # BERT, RoBERTa, ELECTRA
        ("query_proj", "value_proj"),  # DeBERTa
        ("q_lin", "v_lin"),  # DistilBERT
        *LANGUAGE_LORA.target_modules,
    ),
)
"""Text encoders: the same rank and scaling as for language models."""

VISION_TRAINING = TrainingDefaults("Adam", 0.005, "constant", 192, 20, 192)
"""TreeLoRA's for vision transformers (Appendix A.3)."""

LANGUAGE_TRAINING = TrainingDefaults("AdamW", 1e-4, "cosine", 4, 1, 16)
"""TreeLoRA's for language models. Of the paper's two learning rates (1e-4 and 1e-3, A.3) this is
the one of TRACE's scripts. The paper's epochs differ between tasks, see
:mod:`treelora_avalanche.scenarios.trace`."""

L2P_LR = 0.03
"""L2P's, with Adam."""

LAST_TREE_LAMBDA = 0.5
"""Strength of TreeLoRA's pull if the last adapter is used for inference (docs/results.md)."""

TREE_LAMBDA = 0.1
"""The paper's for vision transformers, and ours if inference keeps the past by other means: the
mean of the adapters, or one adapter per task."""

ROUTED_LANGUAGE_TREE_LAMBDA = 0.0
"""With an adapter per prompt a language model forgets nothing, and the pull only costs accuracy
(docs/language_models.md)."""
