"""Fingerprints of the frozen backbone."""

import math

import torch
from torch import nn

from treelora_avalanche.adapters import TrainableView, add_lora
from treelora_avalanche.state import backbone_fingerprint


def test_fingerprint_is_of_the_frozen_weights_alone(tiny_vit):
    def fingerprint(layers="all", change=None, dtype=None, **options):
        model = tiny_vit(**options)
        nn.init.normal_(model.head.weight)
        if change is not None:
            change(model)
        return backbone_fingerprint(TrainableView(add_lora(model.to(dtype), layers=layers)))

    def swap(model):
        weight = model.blocks[0].mlp.fc1.weight.data
        weight[[0, 1]] = weight[[1, 0]]

    def nudge(model):
        weight = model.blocks[0].norm1.weight.data
        weight[5] = math.nextafter(weight[5], 9)
        weight[5] += 1e-6

    first = fingerprint()
    assert first == fingerprint() == fingerprint(layers=[1])
    assert first["structure"] == fingerprint(change=swap)["structure"]
    assert first["values"] != fingerprint(change=swap)["values"]
    assert first["values"] != fingerprint(change=nudge)["values"]
    assert first["structure"] != fingerprint(depth=2)["structure"]
    assert first["structure"] != fingerprint(dtype=torch.bfloat16)["structure"]
    odd = nn.Linear(3, 1).requires_grad_(False)
    assert backbone_fingerprint(odd) == backbone_fingerprint(odd)
