"""Precision of a view's forward pass."""

from __future__ import annotations

from typing import Any, cast

import torch

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.choices import PRECISIONS, check_known


def autocast_dtype(precision: str, device: torch.device | str) -> torch.dtype | None:
    """Returns the value for a view's ``autocast``.

    >>> autocast_dtype("bf16", "cpu")
    torch.bfloat16

    :param precision: ``"fp32"``, the weights' own precision; ``"bf16"``, bfloat16 wherever
        ``torch.autocast`` allows it, the weights and the optimizer staying as they are; ``"auto"``,
        bf16 where the device has instructions for it (GPUs from Ampere on, CPUs with AVX512-BF16 or
        AMX), else fp32.
    :param device: where the model is trained.
    :return: None for the weights' own precision.
    :raises ValueError: if the precision is not known.
    """
    check_known("`precision`", precision, PRECISIONS)
    if precision == "auto":
        precision = "bf16" if _computes_bf16(torch.device(device)) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions bfloat16 is several times slower than float32 on a CPU.
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def set_precision(view: TrainableView, precision: str, device: torch.device | str) -> None:
    """Sets the precision of a view's forward pass.

    In bf16 on a CPU, attention is computed as separate matrix products, by timm's own switch, as
    the backward pass of PyTorch's fused one is slow there.

    :param view: the view of a model.
    :param precision: see :func:`autocast_dtype`.
    :param device: where the model is trained.
    :raises ValueError: if the precision is not known.
    """
    view.autocast = autocast_dtype(precision, device)
    if view.autocast is not None and torch.device(device).type == "cpu":
        for module in view.modules():
            if hasattr(module, "fused_attn"):
                cast(Any, module).fused_attn = False
