"""Default LoRA hyper-parameters for each kind of model."""

from __future__ import annotations

from typing import NamedTuple


class LoRADefaults(NamedTuple):
    """What LoRA is for one kind of model where the user says nothing.

    :param rank: rank of the factors.
    :param alpha: their product is scaled by ``alpha / rank``.
    :param layers: which blocks, see :func:`find_adaptable_layers`.
    :param target_modules: kinds of linear layers inside a block, one set per family of models; the
        first set that a model has is taken.
    """

    rank: int
    alpha: float
    layers: str
    target_modules: tuple[tuple[str, ...], ...]


VISION_LORA = LoRADefaults(10, 10, "first:5", (("qkv",),))
"""timm's transformers; rank and scaling are HiDeLoRA's bottleneck."""


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
"""Causal language models: queries and values, as TreeLoRA adapts them (Table 4: 64 matrices of a
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
"""Text encoders: the same of language models."""


DEFAULT_LAYERS = VISION_LORA.layers
