"""Temporary merging of the active adapter into the base weights, W + BA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from treelora_avalanche.adapters.attach import lora_layers


@contextmanager
def merged_weights(model: nn.Module) -> Iterator[None]:
    """Merges the active adapter into the base weights, W + BA, inside the context, by peft.

    Where a step is short, as in the generation of text, LoRA's two small products take longer to
    launch than to compute. At the end the base weights are restored bit for bit: they are kept, not
    recomputed by subtracting the adapter. The adapter must not change in between::

        with merged_weights(model):
            logits = model(tokens)

    A layer is not merged where that would change its output: where its weights differ in precision
    from the adapter's or are not a plain matrix, or where the adapter has forward hooks.

    :param model: any model; one without LoRA is left as it is.
    """
    merged: list[tuple[LoraLayer, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for layer in lora_layers(model).values():
                if _can_merge(layer):
                    base: Any = layer.get_base_layer()
                    merged.append((layer, base.weight.data))
                    base.weight.data = base.weight.data.clone()
                    layer.merge()
        yield
    finally:
        for layer, weight in merged:
            base = layer.get_base_layer()
            base.weight.data = weight
            layer.merged_adapters.clear()


def _can_merge(layer: LoraLayer) -> bool:
    """Returns whether the layer's output is the same up to rounding when merged."""
    base: Any = layer.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)) or layer.merged or layer.disable_adapters:
        return False
    if type(base.weight.data) is not torch.Tensor:  # sharded over several processes
        return False
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        parts = (layer.lora_A[adapter], layer.lora_B[adapter])
        if any(part.weight.dtype != base.weight.dtype or part._forward_hooks for part in parts):
            return False
        if layer.lora_bias[adapter]:
            return False
    return True
