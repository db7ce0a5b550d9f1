"""Checkpoints of iBOT's pretraining: the teacher's backbone is loaded from all published forms."""

import argparse
import logging
from pathlib import PurePosixPath

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from treelora_avalanche.models import create_vit, image_preprocessing

NAME = "vit_base_patch16_224.dino"  # the architecture and the normalisation of iBOT's ViT-B/16
SMALL = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def backbone():
    """The teacher's backbone: iBOT's vision transformer has timm's names and no classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch16_224", num_classes=0, **SMALL)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def head():
    """Names of iBOT's projection head with a shared last layer, as weight_norm writes them."""
    layers = {
        f"head.mlp.{i}.{kind}": torch.randn(3) for i in (0, 2, 4) for kind in ("weight", "bias")
    }
    last = {
        f"head.{layer}.{part}": torch.randn(3)
        for layer in ("last_layer", "last_layer2")
        for part in ("weight_g", "weight_v")
    }
    return layers | last


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def training_state(backbone):
    """The state that iBOT's main_ibot.py saves: both networks, the optimizer, the arguments."""
    weights = backbone.state_dict()
    student = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    student["masked_embed"] = torch.zeros(1, 24)
    return {
        "student": prefixed("module.", prefixed("backbone.", student) | head()),
        "teacher": prefixed("backbone.", weights) | head(),
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": []},
        "epoch": 80,
        "args": argparse.Namespace(arch="vit_base", global_crops_scale=(0.32, 1.0)),
        "ibot_loss": {"center": torch.zeros(1, 3)},
        "fp16_scaler": {"scale": 65536.0},
    }


LAYOUTS = {
    "backbone alone": lambda b: {"state_dict": b.state_dict()},
    "bare": lambda b: b.state_dict(),
    "with head": lambda b: {"state_dict": b.state_dict() | head()},
    "student's backbone": lambda b: {
        "state_dict": b.state_dict() | {"masked_embed": torch.zeros(1, 24)}
    },
    "training state": training_state,
    "teacher": lambda b: {"teacher": prefixed("backbone.", b.state_dict()) | head()},
    "under DDP": lambda b: {
        "teacher": prefixed("module.", prefixed("backbone.", b.state_dict()) | head())
    },
    "DDP, state_dict": lambda b: {
        "state_dict": prefixed("module.", prefixed("backbone.", b.state_dict()) | head())
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_teachers_backbone_is_loaded_from_every_layout(backbone, tmp_path, layout):
    torch.save(LAYOUTS[layout](backbone), tmp_path / "checkpoint_teacher.pth")
    model = create_vit(
        NAME, num_classes=5, checkpoint=tmp_path / "checkpoint_teacher.pth", **SMALL
    ).eval()
    loaded = model.state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.forward_features(x), backbone.forward_features(x))
    assert model(x).shape == (2, 5)


def test_left_out_tensors_are_logged(backbone, tmp_path, caplog):
    file = tmp_path / "checkpoint.pth"
    state = training_state(backbone)
    state["teacher"]["masked_embed"] = torch.zeros(1, 24)
    torch.save(state, file)
    with caplog.at_level(logging.INFO, logger="treelora_avalanche.models.vision"):
        create_vit(NAME, num_classes=5, checkpoint=file, **SMALL)
    assert "took 'teacher', left out args, epoch, fp16_scaler, ibot_loss, optimizer, student" in (
        caplog.text
    )
    assert "left out 11 tensors of iBOT's pretraining" in caplog.text
    for name in [*head(), "masked_embed"]:
        assert name in caplog.text

    caplog.clear()
    torch.save(LAYOUTS["backbone alone"](backbone), file)
    with caplog.at_level(logging.INFO, logger="treelora_avalanche.models.vision"):
        create_vit(NAME, num_classes=5, checkpoint=file, **SMALL)
    assert "left out" not in caplog.text


@pytest.mark.parametrize("img_size", [32, 96, (64, 32)])
def test_another_image_size_resamples_the_positions(backbone, tmp_path, img_size):
    torch.save(training_state(backbone), tmp_path / "checkpoint.pth")
    model = create_vit(
        NAME,
        num_classes=5,
        checkpoint=tmp_path / "checkpoint.pth",
        **{**SMALL, "img_size": img_size},
    )
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    expected = resample_abs_pos_embed(backbone.pos_embed, [side // 16 for side in size])
    assert expected.shape != backbone.pos_embed.shape
    torch.testing.assert_close(model.pos_embed, expected)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, backbone.blocks[1].mlp.fc2.weight)
    assert model(torch.zeros(1, 3, *size)).shape == (1, 5)


def test_the_published_size_at_112_pixels(tmp_path):
    """ViT-B/16 as published: 224 pixels, 197 positions of 768 values, and here one block."""
    source = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1)
    torch.nn.init.normal_(source.pos_embed)
    torch.save({"teacher": prefixed("backbone.", source.state_dict())}, tmp_path / "ibot.pth")
    file = tmp_path / "ibot.pth"
    model = create_vit(NAME, num_classes=100, checkpoint=file, img_size=112, depth=1)
    assert source.pos_embed.shape == (1, 197, 768)
    torch.testing.assert_close(model.pos_embed, resample_abs_pos_embed(source.pos_embed, [7, 7]))
    preprocessing = image_preprocessing(model)
    assert preprocessing.input_size == (3, 112, 112)
    assert preprocessing.mean == timm.data.IMAGENET_DEFAULT_MEAN  # iBOT's, not timm's 0.5
    assert preprocessing.std == timm.data.IMAGENET_DEFAULT_STD


def test_missing_and_extra_keys_are_named(backbone, tmp_path):
    file = tmp_path / "checkpoint.pth"

    def refused(match):
        with pytest.raises(ValueError, match=match) as error:
            create_vit(NAME, num_classes=5, checkpoint=file, **SMALL)
        assert "\n" not in str(error.value)

    state = training_state(backbone)
    del state["teacher"]["backbone.blocks.1.attn.qkv.bias"]
    state["teacher"]["backbone.blocks.1.gamma_1"] = torch.ones(24)
    state["teacher"]["head2.weight"] = torch.ones(24)
    torch.save(state, file)
    names = r"missing: blocks\.1\.attn\.qkv\.bias; unexpected: blocks\.1\.gamma_1, head2\.weight"
    refused(rf"`checkpoint` .*checkpoint\.pth.*{names}")
    torch.save({"epoch": 3, "args": argparse.Namespace(), "model_weights": {}}, file)
    refused("should hold a state dict.*not tensors: args, epoch, model_weights")
    torch.save({"teacher": {}}, file)
    refused("should hold a state dict.*all is empty")
    torch.save([1, 2], file)
    refused(r"`checkpoint` .*checkpoint\.pth")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_one_clear_error(backbone, tmp_path, share):
    file = tmp_path / "checkpoint_teacher.pth"
    torch.save({"state_dict": backbone.state_dict()}, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    match = r"`checkpoint` .*checkpoint_teacher\.pth' is damaged or incomplete \([\d,]+ bytes"
    with pytest.raises(ValueError, match=match) as error:
        create_vit(NAME, num_classes=5, checkpoint=file, **SMALL)
    assert "\n" not in str(error.value)


def test_a_web_page_saved_as_a_checkpoint_is_damaged_and_pickled_objects_are_refused(tmp_path):
    file = tmp_path / "checkpoint.pth"
    file.write_text("<!DOCTYPE html><title>404 not found</title>")
    with pytest.raises(ValueError, match=r"damaged or incomplete \(43 bytes"):
        create_vit(NAME, num_classes=5, checkpoint=file, **SMALL)
    torch.save({"teacher": PurePosixPath("backbone")}, file)
    with pytest.raises(ValueError, match=r"pickled objects are never loaded"):
        create_vit(NAME, num_classes=5, checkpoint=file, **SMALL)
