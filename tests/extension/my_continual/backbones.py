"""A backbone of our own."""

import torch
from timm.models.vision_transformer import VisionTransformer


def tiny_vit(seed: int = 0):
    """A ViT for 8 x 8 images. Load your own weights here.

    :param seed: seed of the weights.
    """
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=6, num_heads=2
    )
