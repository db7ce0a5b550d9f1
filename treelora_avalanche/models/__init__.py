"""Pretrained backbones in the form that Avalanche trains."""

from treelora_avalanche.models.digits import (
    digits_vit,
    pretrain_self_supervised,
    pretrained_digits_vit,
)
from treelora_avalanche.models.language import LanguageModel, create_language_model
from treelora_avalanche.models.text_encoder import TextEncoder, create_text_encoder
from treelora_avalanche.models.token_loss import TokenCrossEntropy
from treelora_avalanche.models.vision import ImagePreprocessing, create_vit, image_preprocessing

__all__ = [
    "ImagePreprocessing",
    "LanguageModel",
    "TextEncoder",
    "TokenCrossEntropy",
    "create_language_model",
    "create_text_encoder",
    "create_vit",
    "digits_vit",
    "image_preprocessing",
    "pretrain_self_supervised",
    "pretrained_digits_vit",
]
