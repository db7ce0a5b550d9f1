"""Pretrained vision transformers from timm, and the preprocessing that belongs to each.

:func:`create_vit` is ``timm.create_model`` for class-incremental use: it also takes a local weight
file, whatever number of classes or image size those weights were trained with.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor, nn
from torchvision.transforms import Compose, ConvertImageDtype, Normalize

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

# Parts of iBOT's training outside the backbone: the projection head (its `models/head.py`) and the
# embedding of masked patches.
IBOT_PRETRAINING_KEYS = re.compile(r"head\.(mlp|last_layer|last_norm)2?\.|masked_embed$")

_SAMPLE_FORMAT = 339  # TIFF's tag; 1 is unsigned

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------- the backbone


def create_vit(
    name: str,
    *,
    num_classes: int,
    checkpoint: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Returns a timm vision transformer with pretrained weights and a head of ``num_classes``.

    The weights come from ``checkpoint``, a local file, or else from the hub. Position embeddings
    are resampled where ``img_size`` differs from that of the pretraining; the classifier of the
    checkpoint is kept only if it has ``num_classes`` classes; all parameters are float32.

    Checkpoints of iBOT (https://github.com/bytedance/ibot) are read in all their forms: the
    backbone alone (``checkpoint_teacher.pth``, key ``state_dict``) and the whole training state
    (``checkpoint.pth``, of which the key ``teacher`` is taken). The second is the only published
    form of the teacher of "iBOT-21K", ViT-B/16 on ImageNet-22K, used by HiDe-Prompt and TreeLoRA:
    https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/vitb_16_pt22k/checkpoint.pth.
    Projection head and mask embedding, which belong to the pretraining only, are left out, and the
    log lists them. iBOT normalises images with ImageNet's mean and deviation, timm's
    ``vit_base_patch16_224`` with 0.5: choose the name ``vit_base_patch16_224.dino``, the same
    architecture, and :func:`image_preprocessing` gives iBOT's::

        create_vit("vit_base_patch16_224.dino", num_classes=100, checkpoint="checkpoint.pth")

    :param name: name of the model in timm, such as ``vit_base_patch16_224``.
    :param num_classes: number of classes of the head, over all tasks; 0 for a model without a head.
    :param checkpoint: a ``.safetensors`` or ``.pth`` file, or a folder that holds exactly one.
        Nothing in it is executed: ``.pth`` files are read with ``weights_only=True``.
    :param img_size: side of the input images in pixels; by default the model's own.
    :param pretrained: whether to fetch weights from the hub; by default, if there is no
        ``checkpoint``. False gives random weights.
    :param timm_kwargs: further arguments of ``timm.create_model``, such as ``drop_path_rate``.
    :return: the model, as timm makes it.
    :raises ValueError: if the name is unknown or not a vision transformer, if the weights in
        ``checkpoint`` are not those of this model, or if its file is damaged.
    :raises OSError: if the weights cannot be fetched from the hub.
    """
    _check_name(name)
    if checkpoint is not None and pretrained:
        raise ValueError(
            "`pretrained` and `checkpoint` should not both be given, but are True and "
            f"{str(checkpoint)!r}. Leave out one of the two."
        )
    # Found before the model is built, so that a wrong path fails at once.
    file = None if checkpoint is None else _checkpoint_file(Path(checkpoint))
    model = _create_model(
        name,
        pretrained=checkpoint is None and pretrained is not False,
        num_classes=num_classes,
        img_size=img_size,
        **timm_kwargs,
    )
    if file is not None:
        _load_checkpoint(model, file, num_classes)
    return model


def _create_model(name: str, **timm_kwargs: Any) -> nn.Module:
    """Calls timm, with a remedy in the error if the hub cannot be reached."""
    try:
        model = timm.create_model(name, **timm_kwargs)
    except OSError as error:
        raise OSError(
            f"the pretrained weights of {name!r} could not be fetched from the hub "
            f"({type(error).__name__}). Pass a local file as `checkpoint=` (.safetensors or .pth), "
            "or `pretrained=False` for random weights."
        ) from error
    if not hasattr(model, "patch_embed") or not hasattr(model, "blocks"):
        raise ValueError(
            "`name` should be a vision transformer (with patch embedding and blocks), but is "
            f"{name!r}, a {type(model).__name__}. Choose one of timm's, such as "
            "'vit_base_patch16_224'."
        )
    return model


def _check_name(name: str) -> None:
    if ":" in name:  # 'hf-hub:owner/model' and 'local-dir:folder' are resolved by timm itself
        return
    known = timm.list_models() + timm.list_models(pretrained=True)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3) or ["vit_base_patch16_224"]
        raise ValueError(
            f"`name` should be a model of timm {timm.__version__}, but is {name!r}. Did you mean "
            f"{' or '.join(map(repr, nearest))}? timm.list_models('*vit*') lists the known ones."
        )


def _checkpoint_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in CHECKPOINT_SUFFIXES)
        if len(files) != 1:
            found = ", ".join(f.name for f in files) or "none"
            raise ValueError(
                f"`checkpoint` should hold one weight file, but the folder {str(path)!r} holds "
                f"{len(files)} ({found}). Pass the path of one {' or '.join(CHECKPOINT_SUFFIXES)} "
                "file."
            )
        return files[0]
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint` should exist, but {str(path)!r} does not.")
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(
            f"`checkpoint` should be a file of {', '.join(CHECKPOINT_SUFFIXES)}, but is "
            f"{str(path)!r}."
        )
    return path


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Returns the state dict in a file, under the names of a plain model and in float32."""
    state = _read_state(file)
    if isinstance(state.get("teacher"), dict):  # the whole state of a self-distillation
        others = state.keys() - {"teacher"}
        logger.info("%s: took 'teacher', left out %s", file, _some(others, at_most=20))
        state = clean_state_dict(state["teacher"])
    strange = {str(k) for k, v in state.items() if not isinstance(v, Tensor)}
    if strange or not state:
        raise ValueError(
            f"`checkpoint` should hold a state dict, at its top or under 'state_dict', 'model' or "
            f"'teacher', but {str(file)!r} does not "
            f"(not tensors: {_some(strange) or 'all is empty'})."
        )
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    dropped = {name for name in state if IBOT_PRETRAINING_KEYS.match(name)}
    if dropped:
        logger.info(
            "%s: left out %d tensors of iBOT's pretraining, which are not part of the backbone: %s",
            file,
            len(dropped),
            _some(dropped, at_most=len(dropped)),
        )
    # float32 at once: in float16 the resampled position embeddings would be rounded.
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name not in dropped
    }


def _read_state(file: Path) -> dict[str, Any]:
    """Reads a file without executing anything in it."""
    try:
        # iBOT stores its arguments next to the weights: plain values, and nothing to execute.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state: dict[str, Any] = load_state_dict(str(file), weights_only=True)
            return state
    except Exception as error:  # each format has exceptions of its own for a file it cannot read
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error.__cause__ or error, pickle.UnpicklingError) and _is_pickle(file):
            raise ValueError(
                f"`checkpoint` {str(file)!r} cannot be read as plain tensors ({reason}). Files "
                "that hold pickled objects are never loaded: save the state dict alone, best as "
                ".safetensors."
            ) from error
        raise ValueError(
            f"`checkpoint` {str(file)!r} is damaged or incomplete ({file.stat().st_size:,} bytes: "
            f"{reason}). Fetch or write the file again."
        ) from error


def _is_pickle(file: Path) -> bool:
    """Returns whether a file may be torch's: a whole zip archive, or a bare pickle."""
    with file.open("rb") as stream:
        return stream.read(1) == b"\x80" or zipfile.is_zipfile(stream)


def _load_checkpoint(model: nn.Module, file: Path, num_classes: int) -> None:
    weights = _read_weights(file)
    # timm has one filter per family of models in its module: it resamples position embeddings and
    # patches, and renames the keys of the original releases.
    family = sys.modules[type(model).__module__]
    if hasattr(family, "checkpoint_filter_fn"):
        weights = family.checkpoint_filter_fn(weights, model)

    expected = {k: v.shape for k, v in model.state_dict().items()}
    heads = cast(dict[str, Any], model.pretrained_cfg).get("classifier") or ()
    head_keys = {
        f"{head}.{part}"
        for head in ((heads,) if isinstance(heads, str) else heads)
        for part in ("weight", "bias")
    }
    if any(k in weights and weights[k].shape[0] != num_classes for k in head_keys):
        weights = {k: v for k, v in weights.items() if k not in head_keys}
    if weights.keys().isdisjoint(head_keys):  # the head stays freshly initialised
        expected = {k: v for k, v in expected.items() if k not in head_keys}
    problems = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "of another shape": {
            k for k in expected.keys() & weights.keys() if expected[k] != weights[k].shape
        },
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"`checkpoint` should hold the weights of this {type(model).__name__}, but "
            f"{str(file)!r} does not ({listed}). Choose the `name` of the model it was saved from."
        )
    model.load_state_dict(weights, strict=False)


def _some(keys: set[str], at_most: int = 5) -> str:
    names = sorted(keys)
    return ", ".join(names[:at_most]) + (
        f" and {len(names) - at_most} more" if len(names) > at_most else ""
    )


# ------------------------------------------------------------------------------------ preprocessing


def _upright(image: Image.Image) -> Image.Image:
    """Turns a photograph as its EXIF orientation says."""
    image.load()  # a TIFF is turned by this, and its orientation removed
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    # The exceptions by which Pillow reports broken EXIF, which viewers ignore.
    except (SyntaxError, KeyError, TypeError, struct.error):
        return image


def _as_bytes(image: Image.Image, opened: Image.Image) -> np.ndarray[Any, Any]:
    """Scales integers to 8 bit: 16 bits by their format's range, 32 bits by the image's own.

    :param image: the pixels.
    :param opened: the image as Pillow opened it, which knows its format.
    """
    pixels = np.asarray(image)
    # Pillow opens 16-bit PGM, and before version 11 PNG, with 32 bits per pixel.
    if image.mode != "I" or opened.format in ("PNG", "PPM"):
        return np.rint(pixels.clip(0, 65535) / 257).astype(np.uint8)
    tags = getattr(opened, "tag_v2", None)  # of a TIFF
    if tags is not None and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1:
        pixels = pixels.view(np.uint32)  # unsigned, which Pillow reads as signed
    low, high = float(pixels.min()), float(pixels.max())
    return np.rint((pixels - low) * (255 / max(high - low, 1))).astype(np.uint8)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Converts as viewers do; ``convert("RGB")`` alone clips 16 bits and shows hidden colours."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image as 8 bit")
    if image.mode.startswith("I"):
        image = Image.fromarray(_as_bytes(_upright(image), image))
    image = _upright(image)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class ImagePreprocessing:
    """Timm's evaluation preprocessing, in two halves between which images can be cached.

    ``resize`` is the slow half and returns bytes; ``normalize`` is the cheap half. Together they
    are ``timm.data.create_transform`` of the same values. Equal values compare equal, so that
    images resized for one model are reused for the next. The defaults are those of timm for
    ImageNet::

        preprocessing = image_preprocessing(model)
        small = preprocessing.resize(image)  # (3, 224, 224) uint8
        x = preprocessing.normalize(small)  # (3, 224, 224) float32

    :param input_size: channels, height and width of the model's input; 3 channels.
    :param interpolation: PIL's interpolation: "bicubic", "bilinear", ...
    :param mean: mean of each channel, of values in [0, 1].
    :param std: standard deviation of each channel.
    :param crop_pct: side of the crop divided by the side that the image is resized to.
    :param crop_mode: "center", "squash" or "border", as in timm.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_STD
    crop_pct: float = timm.data.DEFAULT_CROP_PCT
    crop_mode: str = timm.data.DEFAULT_CROP_MODE

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or self.input_size[0] != 3:
            raise ValueError(
                "`input_size` should be (3, height, width), as images are read as RGB, but is "
                f"{self.input_size}."
            )

    @cached_property
    def _resize(self) -> Callable[[Image.Image], Tensor]:
        return create_transform(
            input_size=self.input_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,  # the colour of the border in crop_mode "border"
            use_prefetcher=True,  # timm's name for "leave the normalisation to somebody else"
        )

    @cached_property
    def _normalize(self) -> Callable[[Tensor], Tensor]:
        return Compose([ConvertImageDtype(torch.float32), Normalize(self.mean, self.std)])

    def resize(self, image: Image.Image) -> Tensor:
        """Returns the image as RGB bytes of the model's input size, ``(3, height, width)``, uint8.

        :param image: an image of any mode and size. A photograph is turned as its EXIF orientation
            says. Transparent pixels are composed on white; 16 bits are scaled to 8, 32-bit integers
            from the image's own range.
        :raises ValueError: for floating-point images, whose range is unknown.
        """
        return self._resize(_as_rgb(image))

    def normalize(self, image: Tensor) -> Tensor:
        """Returns the normalised image, float32.

        :param image: the result of :meth:`resize`, or a batch of such.
        """
        return self._normalize(image)

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the image after both halves.

        :param image: an image of any mode and size.
        """
        return self.normalize(self.resize(image))


def image_preprocessing(model: nn.Module) -> ImagePreprocessing:
    """Returns the preprocessing of a timm model's pretraining, at the model's actual input size.

    :param model: a model of timm, such as from :func:`create_vit`.
    """
    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:  # timm's table has only the size of the pretraining
        config["input_size"] = (config["input_size"][0], *size)
    return ImagePreprocessing(**config)


def as_preprocessing(given: ImagePreprocessing | nn.Module | None) -> ImagePreprocessing:
    """Returns a preprocessing, that of a model where a model is given.

    :param given: a preprocessing; a timm model; None for timm's defaults for ImageNet.
    """
    if isinstance(given, nn.Module):
        return image_preprocessing(given)
    return given or ImagePreprocessing()
