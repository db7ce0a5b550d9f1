"""Pretrained backbones in the form that Avalanche trains."""

from .digits import digits_vit, pretrain_self_supervised, pretrained_digits_vit
from .language import LanguageModel, create_language_model
from .text_encoder import TextEncoder, create_text_encoder
from .token_loss import TokenCrossEntropy
from .vision import ImagePreprocessing, create_vit, image_preprocessing

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
