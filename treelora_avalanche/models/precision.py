"""In which precision a forward pass computes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from treelora_avalanche.names import check_known

PRECISIONS = ("fp32", "bf16", "auto")


def autocast_dtype(precision: str, device: torch.device | str) -> torch.dtype | None:
    """What a view's ``autocast`` is to be.

    :param precision: ``"fp32"``, the weights' own precision; ``"bf16"``, bfloat16 wherever
        ``torch.autocast`` allows it, the weights and the optimizer staying as they are; ``"auto"``,
        bf16 where the device has instructions for it (GPUs from Ampere on, CPUs with AVX512-BF16 or
        AMX), else fp32.
    :param device: where the model is trained.
    :return: None for the weights' own.
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


def attend_by_products(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
    """Takes attention apart into matrix products where these are faster than PyTorch's fused one.

    That is so on a CPU in bf16, whose fused backward pass is slow. timm's own switch.

    :param model: a model with attention of timm; another is left as it is.
    :param dtype: precision of the forward pass, see :func:`autocast_dtype`.
    :param device: where the model is trained.
    """
    if dtype is torch.bfloat16 and device.type == "cpu":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                cast(Any, module).fused_attn = False
