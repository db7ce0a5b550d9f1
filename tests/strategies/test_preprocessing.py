"""Images normalised as for the pretraining of the model, or a warning."""

import logging

import pytest
import timm
import torch
from PIL import Image

from support import make
from treelora_avalanche.models import ImagePreprocessing, image_preprocessing
from treelora_avalanche.scenarios import SplitImageFolder
from treelora_avalanche.strategies import SeqLoRA

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def white(tmp_path):
    """Four white images of two classes."""
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for k in range(2):
            shade = 255 - k - 2 * (name == "bee")
            Image.new("RGB", (16, 16), (shade,) * 3).save(tmp_path / name / f"{k}.png")
    return tmp_path


@pytest.fixture
def vit():
    """A ViT whose pretraining had mean and deviation 0.5, as timm's vit_base_patch16_224."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=16, depth=2)
    assert model.pretrained_cfg["mean"] == HALF
    return model


def test_a_benchmark_takes_the_model(white, vit):
    by_model = SplitImageFolder(white, 1, preprocessing=vit, seed=0)
    assert by_model.preprocessing == image_preprocessing(vit)
    image, *_ = by_model.train_stream[0].dataset[0]
    assert image.shape == (3, 16, 16)
    assert image.max() == pytest.approx(1, abs=0.03)  # and 2.6 with the mean of ImageNet


def test_another_normalisation_is_logged_once(white, vit, caplog):
    caplog.set_level(logging.WARNING)
    strategy = make(SeqLoRA, vit, train_mb_size=2, train_epochs=1)
    right = SplitImageFolder(white, 1, preprocessing=vit, seed=0).train_stream[0]
    wrong = SplitImageFolder(white, 1, preprocessing=ImagePreprocessing((3, 16, 16)), seed=0)
    strategy.train(right)
    assert not caplog.records
    fresh = make(SeqLoRA, strategy.model.module.get_base_model(), train_mb_size=2)
    for _ in range(2):
        fresh.train(wrong.train_stream[0])
    (record,) = caplog.records
    assert "preprocessing=model" in record.getMessage()
    assert "(0.5, 0.5, 0.5)" in record.getMessage()


def test_a_transform_of_the_users_own_is_not_compared(white, vit, caplog):
    benchmark = SplitImageFolder(
        white,
        1,
        preprocessing=ImagePreprocessing((3, 16, 16)),
        train_transform=torch.Tensor.float,
        eval_transform=torch.Tensor.float,
        seed=0,
    )
    make(SeqLoRA, vit, train_mb_size=2, train_epochs=1).train(benchmark.train_stream[0])
    assert not caplog.records
