"""Pretrained vision transformers: the weights are those of the file, errors name a remedy."""

import copy
import pickle

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import resample_abs_pos_embed

from treelora_avalanche.models import (
    ImagePreprocessing,
    create_vit,
    digits_vit,
    image_preprocessing,
    pretrain_self_supervised,
    pretrained_digits_vit,
)
from treelora_avalanche.models import digits as digits_module
from treelora_avalanche.models.digits import load_digits

DEIT = "deit_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "pretrained": False}


@pytest.fixture(scope="module")
def deit_file(data_root):
    folder = data_root / "deit_tiny_patch16_224_in1k"
    if not folder.is_dir():
        pytest.skip(f"no pretrained DeiT-Tiny: {folder} is not a folder")
    return folder / "model.fp16.safetensors"


@pytest.fixture
def small_file(tmp_path):
    """Weights of a small ViT with 7 classes, with the model they came from."""
    model = timm.create_model(DEIT, **SMALL, num_classes=7)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors", model


# -------------------------------------------------------------------------------------- checkpoints


def test_loaded_weights_are_those_of_the_file(deit_file):
    model = create_vit(DEIT, num_classes=1000, checkpoint=deit_file)
    truth = safetensors.torch.load_file(deit_file)
    loaded = model.state_dict()
    assert loaded.keys() == truth.keys()
    for name, tensor in truth.items():
        assert loaded[name].dtype == torch.float32
        torch.testing.assert_close(loaded[name], tensor.float(), rtol=0, atol=0)


def test_another_image_size_resamples_positions_and_another_head_is_fresh(deit_file):
    torch.manual_seed(0)
    model = create_vit(DEIT, num_classes=10, checkpoint=deit_file.parent, img_size=112)
    truth = {k: v.float() for k, v in safetensors.torch.load_file(deit_file).items()}
    loaded = model.state_dict()
    positions = resample_abs_pos_embed(truth.pop("pos_embed"), [7, 7])
    torch.testing.assert_close(loaded.pop("pos_embed"), positions)
    assert loaded.pop("head.weight").shape == (10, 192)
    assert loaded.pop("head.bias").shape == (10,)
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, truth[name], rtol=0, atol=0)
    assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 10)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_pth_files_give_the_same_model(small_file, tmp_path, wrap):
    _, source = small_file
    torch.save(wrap(source.state_dict()), tmp_path / "small.pth")
    options = {k: v for k, v in SMALL.items() if k != "pretrained"}
    model = create_vit(DEIT, num_classes=7, checkpoint=tmp_path / "small.pth", **options)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_a_checkpoint_without_a_head_and_a_model_without_one(small_file, tmp_path):
    file, source = small_file
    features = create_vit(DEIT, num_classes=0, checkpoint=file, **SMALL)
    x = torch.randn(2, 3, 32, 32)
    truth = source.eval().forward_head(source.forward_features(x), pre_logits=True)
    assert torch.equal(features.eval()(x), truth)
    safetensors.torch.save_file(features.state_dict(), tmp_path / "headless.safetensors")
    again = create_vit(DEIT, num_classes=3, checkpoint=tmp_path / "headless.safetensors", **SMALL)
    assert again(x).shape == (2, 3)


def test_weights_of_another_model_are_named(small_file):
    file, _ = small_file
    with pytest.raises(ValueError, match=r"missing: blocks\.2\..* and \d+ more"):
        create_vit(DEIT, num_classes=7, checkpoint=file, **{**SMALL, "depth": 3})
    with pytest.raises(ValueError, match=r"unexpected: blocks\.1\."):
        create_vit(DEIT, num_classes=7, checkpoint=file, **{**SMALL, "depth": 1})
    with pytest.raises(ValueError, match=r"of another shape: .*blocks\.0\.attn"):
        create_vit(DEIT, num_classes=7, checkpoint=file, **{**SMALL, "embed_dim": 48})


class _Trap:
    """Unpickling it makes the test fail."""

    def __reduce__(self):
        return pytest.fail, ("a pickled object was executed",)


def test_pickled_objects_are_never_executed(tmp_path):
    torch.save({"model": _Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"`checkpoint` .*trap\.pth.*safetensors"):
        create_vit(DEIT, num_classes=7, checkpoint=tmp_path / "trap.pth", **SMALL)
    (tmp_path / "trap.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"`checkpoint` .*trap\.safetensors"):
        create_vit(DEIT, num_classes=7, checkpoint=tmp_path / "trap.safetensors", **SMALL)


def test_checkpoint_paths_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`checkpoint` should exist, .*none\.pth"):
        create_vit(DEIT, num_classes=7, checkpoint=tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"should hold one weight file, .* holds 0"):
        create_vit(DEIT, num_classes=7, checkpoint=tmp_path)
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds 2 \(a\.pth, b\.safetensors\)"):
        create_vit(DEIT, num_classes=7, checkpoint=tmp_path)
    (tmp_path / "c.npz").touch()
    with pytest.raises(ValueError, match=r"should be a file of \.safetensors"):
        create_vit(DEIT, num_classes=7, checkpoint=tmp_path / "c.npz")
    with pytest.raises(ValueError, match="Leave out one"):
        create_vit(DEIT, num_classes=7, checkpoint=tmp_path / "a.pth", pretrained=True)


def test_model_names():
    with pytest.raises(ValueError, match=r"but is 'deit_tinny_patch16_224'.*'deit_tiny_patch16"):
        create_vit("deit_tinny_patch16_224", num_classes=2)
    with pytest.raises(ValueError, match=r"should be a vision transformer .* but is 'resnet18'"):
        create_vit("resnet18", num_classes=2, pretrained=False)
    tagged = create_vit("deit_tiny_patch16_224.fb_in1k", num_classes=2, **SMALL)
    assert isinstance(tagged, timm.models.VisionTransformer)


def test_unreachable_hub_is_an_error_with_a_remedy(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"'{DEIT}' could not be fetched .*`checkpoint=`") as error:
        create_vit(DEIT, num_classes=2, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ preprocessing


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(20, 150),
    height=st.integers(20, 150),
    side=st.sampled_from([32, 48]),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 99),
)
def test_both_halves_together_are_timms_transform(
    width, height, side, crop_mode, interpolation, seed
):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    config = {
        "input_size": (3, side, side),
        "interpolation": interpolation,
        "crop_mode": crop_mode,
        "crop_pct": 0.9,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    preprocessing = ImagePreprocessing(**config)
    resized = preprocessing.resize(image)
    assert resized.dtype == torch.uint8
    assert resized.shape == (3, side, side)
    truth = create_transform(**config, is_training=False)(image)
    assert torch.equal(preprocessing.normalize(resized), truth)
    assert torch.equal(preprocessing(image), truth)
    assert torch.equal(preprocessing.normalize(resized[None]), truth[None])


def test_preprocessing_of_a_model_follows_its_actual_size():
    model = create_vit(DEIT, num_classes=2, **SMALL)
    preprocessing = image_preprocessing(model)
    assert preprocessing.input_size == (3, 32, 32)
    config = resolve_model_data_config(model)
    assert preprocessing.mean == config["mean"]
    assert preprocessing.crop_pct == config["crop_pct"]
    assert image_preprocessing(timm.create_model(DEIT)) == ImagePreprocessing(crop_pct=0.9)


def test_preprocessing_compares_by_value_and_can_be_sent_to_workers():
    image = Image.new("L", (40, 30), 77)
    preprocessing = ImagePreprocessing(input_size=(3, 16, 16))
    expected = preprocessing(image)  # also fills the cached transforms
    copied = pickle.loads(pickle.dumps(preprocessing))
    assert copied == preprocessing
    assert hash(copied) == hash(ImagePreprocessing(input_size=(3, 16, 16)))
    assert torch.equal(copied(image), expected)
    with pytest.raises(ValueError, match=r"`input_size` should be .* but is \(1, 8, 8\)"):
        ImagePreprocessing(input_size=(1, 8, 8))


# ------------------------------------------------------------------------------------------- digits


def test_digits_are_split_once_and_stratified():
    digits = load_digits()
    assert digits.train_images.shape == (1347, 1, 8, 8)
    assert digits.test_images.shape == (450, 1, 8, 8)
    pixels = torch.cat([digits.train_images, digits.test_images])
    assert (pixels.min(), pixels.max()) == (-1, 1)
    share = digits.test_labels.bincount() / torch.cat(digits[1::2]).bincount()
    torch.testing.assert_close(share, torch.full((10,), 0.25), rtol=0, atol=0.01)


def _pretrained_for_a_moment(seed, images):
    torch.manual_seed(0)
    return pretrain_self_supervised(digits_vit(), images, epochs=1, seed=seed, batch_size=16)


def test_pretraining_is_deterministic_and_leaves_head_mode_and_random_state_alone():
    images = load_digits().train_images[:32]
    torch.manual_seed(0)
    fresh = digits_vit().eval()
    before = copy.deepcopy(fresh.state_dict())
    random_state = torch.get_rng_state()
    pretrain_self_supervised(fresh, images, epochs=1, seed=3, batch_size=16)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not fresh.training
    after = fresh.state_dict()
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    same = _pretrained_for_a_moment(3, images).state_dict()
    assert all(torch.equal(after[name], same[name]) for name in after)
    other = _pretrained_for_a_moment(4, images).state_dict()
    assert not torch.equal(after["pos_embed"], other["pos_embed"])


def test_pretraining_arguments():
    with pytest.raises(ValueError, match=r"`images` should be at least 2 images .* but is 1"):
        pretrain_self_supervised(digits_vit(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="`epochs` should be at least 1, but is 0"):
        pretrain_self_supervised(digits_vit(), torch.zeros(4, 1, 8, 8), epochs=0)


def test_pretrained_digits_vit_is_made_once_and_copied(monkeypatch):
    made = []

    def pretrain(model, images, *, seed):
        made.append(seed)
        return model

    monkeypatch.setattr(digits_module, "pretrain_self_supervised", pretrain)
    digits_module._pretrained.cache_clear()
    try:
        random_state = torch.get_rng_state()
        first, second, other = (pretrained_digits_vit(seed) for seed in (5, 5, 6))
        assert torch.equal(torch.get_rng_state(), random_state)
    finally:
        digits_module._pretrained.cache_clear()
    assert made == [5, 6]
    assert first is not second
    assert torch.equal(first.pos_embed, second.pos_embed)
    assert not torch.equal(first.pos_embed, other.pos_embed)
    with torch.no_grad():
        first.pos_embed.zero_()
    assert second.pos_embed.abs().sum() > 0


def test_pretraining_without_labels_separates_digits():
    """Nearest class mean on frozen features, trained on one half of the training digits."""
    images, labels = load_digits()[:2]
    torch.manual_seed(0)
    model = digits_vit()
    half = len(images) // 2

    @torch.no_grad()
    def accuracy():
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        features = torch.nn.functional.normalize(features, dim=1)
        means = torch.stack([features[:half][labels[:half] == c].mean(0) for c in range(10)])
        nearest = torch.cdist(features[half:], means).argmin(1)
        return (nearest == labels[half:]).float().mean().item()

    random_weights = accuracy()
    pretrain_self_supervised(model, images[:half], epochs=12)
    assert accuracy() > max(0.75, random_weights + 0.05)
