"""Pretrained backbones in the form that Avalanche trains."""

from .digits import digits_vit, pretrain_self_supervised, pretrained_digits_vit
from .vision import ImagePreprocessing, create_vit, image_preprocessing

__all__ = [
    "ImagePreprocessing",
    "create_vit",
    "digits_vit",
    "image_preprocessing",
    "pretrain_self_supervised",
    "pretrained_digits_vit",
]
