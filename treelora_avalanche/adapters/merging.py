"""The live adapter as part of the weights, for as long as a model answers."""

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
    """A context in which every adapted layer is one matrix, by peft's own merging.

    Where a step is short, as in the generation of a text, LoRA's two small products take longer to
    start than to compute. At the end the layers have their own weights back, to the last bit: they
    are put aside, and not computed by taking the adapter out again. Nothing may change the adapter
    meanwhile.

    A layer is left as it is where merging would answer otherwise: where its weights have another
    precision than the adapter, are not a plain matrix, or where something listens to the adapter.

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
    """Whether the layer answers the same up to rounding when merged."""
    base: Any = layer.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)) or layer.merged or layer.disable_adapters:
        return False
    if type(base.weight.data) is not torch.Tensor:  # a part of it, in several processes
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
