"""Adapters as the folders that peft writes and loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from peft import PeftModel
from torch import nn


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save the live adapter, and the classifier trained with it, as a folder that peft loads.

    The folder is written beside its place and then renamed, so it is there whole or not at all.

    :param model: a model that is, or wraps, a :class:`peft.PeftModel`.
    :param folder: where to; an adapter that is already there is replaced.
    :raises ValueError: if there is no :class:`peft.PeftModel` in the model.
    """
    peft_model = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    if peft_model is None:
        raise ValueError(f"`model` ({type(model).__name__}) is no peft model; nothing to save.")
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    peft_model.save_pretrained(str(unfinished))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Put a saved adapter on a pretrained model, to be trained on or evaluated.

    :param model: the pretrained model that the adapter was trained on.
    :param folder: what :func:`save_adapter`, or peft, has written.
    :return: the peft model around ``model``.
    :raises FileNotFoundError: if the folder holds no adapter.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: adapter_config.json is missing.")
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
