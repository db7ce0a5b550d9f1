"""Fingerprint of a frozen backbone, to check that a state belongs to it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_SAMPLES = 64


def backbone_fingerprint(model: nn.Module) -> dict[str, str]:
    """Returns a fingerprint of the frozen parameters of a model: the same on every device.

    It covers the sum of all bits and a sample of values in order, in one pass over memory without
    copies. Trainable parameters and the choice of layers with LoRA do not change it.

    :param model: a model, with or without LoRA.
    :return: ``structure``, of names, shapes and dtypes, and ``values``, as hexadecimal digits.
    """
    frozen = {
        # peft renames the layers that it adapts.
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in nn.Module.named_parameters(model)
        # peft keeps the original of a trained classifier; it is random and unused.
        if not parameter.requires_grad and ".original_module." not in name
    }
    names = sorted(frozen)
    structure = [(name, tuple(frozen[name].shape), str(frozen[name].dtype)) for name in names]
    digest = hashlib.sha256()
    parts = [_sum_and_sample(frozen[name]) for name in names if frozen[name].numel()]
    if parts:
        # One transfer per device.
        for device in sorted({part.device for part in parts}, key=str):
            on_device = torch.cat([part for part in parts if part.device == device]).cpu()
            digest.update(on_device.numpy().tobytes())
    return {
        "structure": hashlib.sha256(repr(structure).encode()).hexdigest(),
        "values": digest.hexdigest(),
    }


def _sum_and_sample(tensor: Tensor) -> Tensor:
    """Returns the sum of the bits as integers, exact in any order, and some of them."""
    if isinstance(tensor, DTensor):  # sharded over processes
        tensor = tensor.full_tensor()
    flat = tensor.contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    size = 8 if flat.nbytes % 8 == 0 else flat.element_size()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = flat.view(integer)
    step = max(1, len(bits) // _SAMPLES)
    return torch.cat((bits.sum(dtype=torch.int64)[None], bits[::step].to(torch.int64)))


__all__ = ["backbone_fingerprint"]
