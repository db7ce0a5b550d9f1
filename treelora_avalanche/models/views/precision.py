"""Precision of a model's forward pass, and of what is trained in it."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from treelora_avalanche.adapters import TrainableView, find_host, lora_layers
from treelora_avalanche.adapters.classifier import find_classifiers
from treelora_avalanche.adapters.trainable_view import HALF, at_least_float32
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
    """Sets the precision of a view's forward pass, and trains in float32.

    See :func:`train_in_float32`. In bf16 on a CPU, attention is computed as separate matrix
    products, by timm's own switch, as the backward pass of PyTorch's fused one is slow there.

    :param view: the view of a model.
    :param precision: see :func:`autocast_dtype`.
    :param device: where the model is trained.
    :raises ValueError: if the precision is not known, or the model cannot be trained in float32.
    """
    train_in_float32(view)
    view.autocast = autocast_dtype(precision, device)
    if view.autocast is not None and torch.device(device).type == "cpu":
        for module in view.modules():
            if hasattr(module, "fused_attn"):
                cast(Any, module).fused_attn = False


def train_in_float32(model: nn.Module) -> None:
    """Makes what is trained of a model in half precision float32, in place.

    In 8 or 11 bits the optimizer's small steps are lost, and float16 overflows. LoRA's factors, the
    classifier and other trained layers become float32; the frozen weights keep their precision.
    The model takes float32 inputs, and returns class logits and features in float32. A model that
    is trained as a whole becomes float32. Of a language model only LoRA's factors are converted.

    A model in float32 is left as it is::

        model = timm.create_model("vit_base_patch16_224", num_classes=10).bfloat16()
        train_in_float32(add_lora(model))
        model(images).dtype  # float32

    :param model: a model whose frozen parameters require no gradient, or a view of one.
    :raises ValueError: if a trained parameter in half precision is no layer's own, or if a whole
        language model is in float16.
    """
    network = model.module if isinstance(model, TrainableView) else model
    for layer in lora_layers(network).values():
        for factor in cast(nn.Module, layer).parameters():
            if factor.requires_grad and factor.dtype in HALF:
                factor.data = factor.data.float()
    if find_host(network) is not None:
        _check_not_float16(network)
    elif all(p.requires_grad for p in network.parameters()):
        if _trained_halves(network):
            network.float()
    else:
        _convert_trained_layers(network)
        _cast_to_frozen_weights(network)


def _trained_halves(network: nn.Module) -> dict[str, nn.Parameter]:
    trained = nn.Module.named_parameters(network)
    return {name: p for name, p in trained if p.requires_grad and p.dtype in HALF}


def _check_not_float16(network: nn.Module) -> None:
    name = next((n for n, p in _trained_halves(network).items() if p.dtype == torch.float16), None)
    if name is not None:
        raise ValueError(
            f"`model` should be trained in float32 or bfloat16, but `{name}` is float16, in which "
            "gradients and the optimizer's steps overflow or vanish. Load the model with "
            "dtype='bfloat16' or 'float32'."
        )


def _convert_trained_layers(network: nn.Module) -> None:
    for classifier in find_classifiers(network).values():
        if _trained_halves(classifier):
            _hook_inputs(classifier.float(), torch.float32)
    for name, parameter in _trained_halves(network).items():
        layer = network.get_submodule(name.rpartition(".")[0])
        if next(layer.children(), None) is not None:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"`model` should have its trained parameters in float32, but `{name}` is {dtype}, "
                "in no layer of its own that could cast its inputs. Convert the model with "
                "`.float()`; precision='bf16' computes in bfloat16 all the same."
            )
        compute_in_float32(layer, parameter.dtype)


def compute_in_float32(layer: nn.Module, dtype: torch.dtype) -> None:
    """Converts a layer of a model in half precision to float32; its output keeps the precision.

    :param layer: the layer.
    :param dtype: precision of the output.
    """
    layer.register_forward_hook(partial(_cast_output, dtype))
    _hook_inputs(layer.float(), torch.float32)


def _cast_to_frozen_weights(network: nn.Module) -> None:
    """Lets a frozen model in half precision take float32 inputs and return float32."""
    frozen = (p for p in network.parameters() if not p.requires_grad and p.is_floating_point())
    first = next(frozen, None)
    if first is None or first.dtype not in HALF:
        return
    base = network.get_base_model() if isinstance(network, PeftModel) else network
    base.register_forward_hook(_full_precision_output)
    # Views call the embedding of timm's transformers, and not always the model.
    for module in (base, *(getattr(m, "patch_embed", None) for m in base.modules())):
        if isinstance(module, nn.Module):
            _hook_inputs(module, first.dtype)


def _hook_inputs(module: nn.Module, dtype: torch.dtype) -> None:
    hooks = module._forward_pre_hooks.values()
    if not any(isinstance(hook, partial) and hook.func is _cast_inputs for hook in hooks):
        module.register_forward_pre_hook(partial(_cast_inputs, dtype))


def _cast_inputs(dtype: torch.dtype, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )


def _cast_output(dtype: torch.dtype, _: nn.Module, inputs: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output


def _full_precision_output(_: nn.Module, inputs: Any, output: Any) -> Any:
    of_samples = isinstance(output, Tensor) and output.ndim == 2
    return at_least_float32(output) if of_samples else output
