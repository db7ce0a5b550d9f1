"""Loading of transformers models from a folder or from the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treelora_avalanche.choices import check_model_folder


@contextmanager
def from_folder_or_hub(
    name_or_folder: str | os.PathLike[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Checks a folder, and turns errors of ``from_pretrained`` inside the context into clear ones::

        with from_folder_or_hub(name_or_folder) as (name, safe):
            model = AutoModel.from_pretrained(name, **safe)

    :param name_or_folder: a folder that ``save_pretrained`` has written, or a name on the hub.
    :return: the name to load, and the arguments that keep a model's own code from being run.
    :raises FileNotFoundError: if a file is missing in the folder.
    :raises OSError: if the hub cannot be reached, or does not have the model.
    """
    name = os.fspath(name_or_folder)
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local:
        check_model_folder(folder)
        name = str(folder)
    elif folder.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"`name_or_folder` should be a folder, but {name!r} is none.")
    try:
        yield name, {"trust_remote_code": False}
    except OSError as error:
        if local:
            raise
        raise OSError(
            f"`name_or_folder` is {name!r}, which could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}). Check the name, your connection, and whether its licence "
            "must be accepted there, or pass a folder on this machine that holds config.json, the "
            "tokenizer and *.safetensors."
        ) from error
