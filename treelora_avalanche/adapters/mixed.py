"""Adapters of a bank as named adapters of peft, for batches that mix them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from treelora_avalanche.adapters.attach import lora_layers
from treelora_avalanche.adapters.bank import AdapterBank
from treelora_avalanche.adapters.factors import LayerShape

BASE = "__base__"
"""Peft's name, in ``adapter_names``, of the model without any adapter."""


@contextmanager
def named_adapters(network: PeftModel, bank: AdapterBank) -> Iterator[Callable[[int], str]]:
    """Yields a function from an index in the bank to the name of a peft adapter with its factors.

    An adapter is loaded at its first use, and all are deleted at the end, so that the model is as
    before. Peft's forward pass then takes one name per sample::

        with named_adapters(network, bank) as name:
            network.generate(**batch, adapter_names=[name(0), name(2), BASE])

    :param network: the peft model.
    :param bank: the bank of its adapters. Index -1 stands for the model without an adapter.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    loaded: dict[int, str] = {}

    def name(index: int) -> str:
        if index < 0:
            return BASE
        if index not in loaded:
            loaded[index] = f"bank_{index}"
            _load(network, loaded[index], bank, index)
        return loaded[index]

    try:
        yield name
    finally:
        for adapter in loaded.values():
            network.delete_adapter(adapter)
        # Peft decides anew what is trainable whenever an adapter comes.
        network.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _load(network: PeftModel, name: str, bank: AdapterBank, index: int) -> None:
    config = copy.copy(network.active_peft_config)
    config.inference_mode = True
    with torch.random.fork_rng():  # the initial values are drawn, and overwritten
        network.add_adapter(name, config)
    with torch.no_grad():
        for layer, row in zip(lora_layers(network).values(), bank[index], strict=True):
            # Made in training mode, in which generation would be random.
            layer.lora_dropout[name].train(network.training)
            a, b = _weight(layer.lora_A[name]), _weight(layer.lora_B[name])
            given = LayerShape(a.shape[0], a.shape[1], b.shape[0]).split(row)
            a.copy_(given[0])
            b.copy_(given[1])


def _weight(linear: nn.Module) -> nn.Parameter:
    return linear.get_parameter("weight")
