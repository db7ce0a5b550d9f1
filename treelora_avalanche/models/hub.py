"""Models of transformers, from a folder or from the Hugging Face hub, with errors to act on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def from_folder_or_hub(
    name_or_folder: str | os.PathLike[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A context in which to call ``from_pretrained``.

    :param name_or_folder: a folder that ``save_pretrained`` has written, or a name on the hub.
    :return: the name to load, and the arguments that keep a model's own code from being run.
    :raises FileNotFoundError: if the folder lacks something.
    :raises OSError: if the hub cannot be reached, or does not have the model.
    """
    name = os.fspath(name_or_folder)
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local:
        _check_folder(folder)
        name = str(folder)
    elif folder.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"`name_or_folder` is {name!r}, which is not a folder.")
    try:
        yield name, {"trust_remote_code": False}
    except OSError as error:
        if local:
            raise
        raise OSError(
            f"{name!r} could not be fetched from the Hugging Face hub ({type(error).__name__}); "
            "check the name, your connection, and whether its licence must be accepted there, or "
            "pass a folder on this machine that holds config.json, the tokenizer and "
            "*.safetensors."
        ) from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"`name_or_folder` is {str(folder)!r}, a folder without config.json; pass one that "
            "`save_pretrained` has written."
        )
    if not any(folder.glob("*.safetensors")):
        others = sorted(f.name for end in ("*.bin", "*.pt", "*.pth") for f in folder.glob(end))
        found = f" (found {', '.join(others)}, which may hold code)" if others else ""
        raise FileNotFoundError(
            f"`name_or_folder` is {str(folder)!r}, a folder without weights in safetensors{found}; "
            "load it with transformers where you trust it, and save it with "
            "`model.save_pretrained(folder)`."
        )
