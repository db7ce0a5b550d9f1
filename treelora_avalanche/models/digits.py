"""Vision transformer for scikit-learn's 8 x 8 digits, pretrained without labels in seconds.

It replaces a pretrained ViT where nothing may be downloaded: in the demo and the tests.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class Digits(NamedTuple):
    """Digits in a fixed split; pixels in [-1, 1]."""

    train_images: Tensor  # (1347, 1, 8, 8) float32
    train_labels: Tensor  # (1347,) int64
    test_images: Tensor  # (450, 1, 8, 8)
    test_labels: Tensor  # (450,)


@lru_cache(maxsize=1)
def load_digits() -> Digits:
    """Returns scikit-learn's digits (no download): of each class 75% to train, 25% to test."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    pixels, labels = datasets.load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64) for y in split[2:])
    return Digits(train_x / 8 - 1, train_y, test_x / 8 - 1, test_y)  # pixels are 0..16


def digits_vit(num_classes: int = 10) -> VisionTransformer:
    """Returns a small timm vision transformer for 8 x 8 images: 4 patches, 6 blocks, 0.2 M values.

    :param num_classes: number of classes of the head.
    """
    model = VisionTransformer(
        img_size=8,
        patch_size=4,  # as accurate as 2 on held-out digits, and three times as fast
        in_chans=1,
        num_classes=num_classes,
        embed_dim=64,
        depth=6,
        num_heads=4,
        mlp_ratio=2,
        weight_init="jax",  # timm's default, std 0.02, is meant for wider models
    )
    # At timm's 0.02 the position of a patch drowns in its content, and learning takes several
    # times as many steps.
    nn.init.trunc_normal_(cast(Tensor, model.pos_embed), std=0.4)
    if num_classes > 0:
        nn.init.trunc_normal_(
            cast(nn.Linear, model.head).weight, std=0.02
        )  # "jax" leaves the head at zero
    return model


def pretrain_self_supervised(
    model: VisionTransformer,
    images: Tensor,
    *,
    epochs: int = 40,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    temperature: float = 0.2,
) -> VisionTransformer:
    """Pretrains a vision transformer on unlabelled images: the offline stage before the stream.

    Contrastive (SimCLR, arXiv 2002.05709): two views of an image, slightly shifted, turned, scaled
    and noisy, should be closer to each other than to the views of all other images of the batch.
    Chosen by nearest class mean on the frozen features of held-out training digits, at about equal
    time: contrastive 87 to 89, masked pixel modelling with patches of 2 pixels 67, random weights
    68 to 74, the pixels themselves 92.

    Deterministic under ``seed``; the global random state is left unchanged::

        model = pretrain_self_supervised(digits_vit(), load_digits().train_images, epochs=10)

    :param model: trained in place, without its head.
    :param images: ``(n, channels, height, width)``, in [-1, 1] with background at -1.
    :param epochs: passes over the images.
    :param seed: seed of the order of the images, the views and the projection.
    :param batch_size: images per step; at most ``n``.
    :param learning_rate: peak of a one-cycle schedule, of AdamW.
    :param temperature: temperature of the contrastive loss.
    :return: ``model``.
    :raises ValueError: if there are fewer than 2 images, or ``epochs`` is below 1.
    """
    for name, value in (("images", len(images)), ("batch_size", batch_size)):
        if value < 2:
            raise ValueError(f"`{name}` should be at least 2 images to contrast, but is {value}.")
    if epochs < 1:
        raise ValueError(f"`epochs` should be at least 1, but is {epochs}.")
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # only the CPU's, which is restored
        _contrast(
            model.train(),
            images,
            epochs=epochs,
            batch_size=min(batch_size, len(images)),
            learning_rate=learning_rate,
            temperature=temperature,
            generator=generator,
        )
    return model.train(was_training)


def _contrast(
    model: VisionTransformer,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    temperature: float,
    generator: torch.Generator,
) -> None:
    """Trains a model and a projection of its features by the contrastive loss."""
    dim, device, n_batches = model.num_features, images.device, len(images) // batch_size
    projection = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)).to(device)
    parameters = [*model.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    # The extra step keeps the schedule's phases apart in very short runs.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * n_batches + 1, pct_start=0.1
    )
    partner = torch.arange(2 * batch_size, device=device).roll(batch_size)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(batch_size)[:n_batches]:
            batch = images[chosen.to(device)]
            views = torch.cat([_view(batch, generator), _view(batch, generator)])
            features = model.forward_head(model.forward_features(views), pre_logits=True)
            z = F.normalize(projection(features), dim=1)
            similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
            optimizer.zero_grad()
            F.cross_entropy(similarity, partner).backward()
            optimizer.step()
            schedule.step()


def _view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts (up to a pixel of 8), turns (14 degrees), scales and perturbs each of the images."""
    turn, scale, *shift = torch.rand(4, len(images), generator=generator) * 2 - 1
    turn, scale = 0.25 * turn, 1 + 0.15 * scale
    cos, sin = scale * turn.cos(), scale * turn.sin()
    rows = [cos, -sin, 0.25 * shift[0], sin, cos, 0.25 * shift[1]]
    affine = torch.stack(rows, dim=1).view(-1, 2, 3).to(images.device)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # zero padding is background
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return moved + 0.1 * noise


def pretrained_digits_vit(seed: int = 0) -> VisionTransformer:
    """Returns :func:`digits_vit`, pretrained without labels on the training digits.

    The first call for a seed takes some seconds; later ones in the process copy its result.

    :param seed: seed of the initial weights and of the pretraining.
    """
    return copy.deepcopy(_pretrained(seed))


@lru_cache(maxsize=8)
def _pretrained(seed: int) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = digits_vit()
    return pretrain_self_supervised(model, load_digits().train_images, seed=seed)
