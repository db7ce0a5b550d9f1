"""Image models of transformers and torchvision, and the models of timm to use in their place."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer
from transformers import PreTrainedModel

_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_NAMES = {
    "vit": "vit_{size}_patch{patch}_{side}",
    "deit": "deit_{size}_patch{patch}_{side}",
    "beit": "beit_{size}_patch{patch}_{side}",
    "dinov2": "vit_{size}_patch14_dinov2",
    "dinov2_with_registers": "vit_{size}_patch14_reg4_dinov2",
    "dinov3_vit": "vit_{size}_patch{patch}_dinov3",
    "siglip": "vit_{size}_patch{patch}_siglip_{side}",
    "clip": "vit_{size}_patch{patch}_clip_{side}",
    "swin": "swin_tiny_patch4_window7_224",
    "swinv2": "swinv2_tiny_window8_256",
}
"""Names in timm by transformers' ``model_type``."""


def is_image_model(model: nn.Module) -> bool:
    """Returns whether a model is one of transformers that takes images.

    :param model: any model.
    """
    return isinstance(model, PreTrainedModel) and model.main_input_name == "pixel_values"


def timm_equivalent(model: nn.Module) -> str:
    """Returns timm's name of the architecture of a model of transformers or torchvision.

    >>> timm_equivalent(torchvision.models.vit_b_16())
    'vit_base_patch16_224'

    :param model: the model.
    :return: the name for its family and, where timm has it, its size.
    """
    config: Any = getattr(model, "config", model)
    config = getattr(config, "vision_config", config)
    family = "swin" if isinstance(model, SwinTransformer) else "vit"
    family = getattr(getattr(model, "config", None), "model_type", family)
    width = getattr(config, "hidden_size", getattr(config, "hidden_dim", None))
    patch = getattr(config, "patch_size", None)
    side = getattr(config, "image_size", None)
    known = timm.list_models()
    template = _NAMES.get(family, _NAMES["vit"])
    own = template.format(size=_WIDTHS.get(width or 0), patch=patch, side=side)
    usual = template.format(size="base", patch=16, side=224)
    return next((name for name in (own, usual) if name in known), "vit_base_patch16_224")


def use_timm(model: nn.Module) -> str:
    """Returns the remedy of an error for a model of another library.

    :param model: the model.
    """
    if hasattr(model, "timm_model"):  # transformers' wrapper
        return "Pass the model of timm that it holds, its `timm_model`."
    return (
        f"Use timm's model of its kind, such as timm.create_model({timm_equivalent(model)!r}, "
        "pretrained=True, num_classes=...)."
    )


def check_not_torchvision(model: nn.Module, target_modules: Any) -> None:
    """Raises an error for torchvision's transformers, whose attention never calls its projections.

    :param model: any model.
    :param target_modules: layers that the user has chosen; those of a Swin can be adapted.
    :raises ValueError: if it is one.
    """
    is_vit = isinstance(model, VisionTransformer)
    if is_vit or (isinstance(model, SwinTransformer) and target_modules is None):
        raise ValueError(
            f"`model` should call the projections of its attention, but torchvision's "
            f"{type(model).__name__} reads only their weights. {use_timm(model)}"
        )
