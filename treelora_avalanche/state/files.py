"""Files of a state: tensors in one safetensors file, everything else in one JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from treelora_avalanche.state.checks import State, check_keys, some_of

FORMAT_VERSION = 1
TENSOR_FILE = "state.safetensors"
VALUE_FILE = "state.json"

_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip


def save_state(folder: str | os.PathLike[str], state: State) -> None:
    """Writes a state as a folder of two files, completely or not at all.

    :param folder: folder of the state; an existing state is replaced once the new one is complete.
    :param state: the state. Tensors come back on the CPU, contiguous and without gradient.
    :raises TypeError: if the state holds something that is neither a tensor nor a plain value; the
        message names its place.
    :raises ValueError: if ``folder`` is a file, or holds anything but a state.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` should be a folder, but {folder} is a file. Choose another.")
    if folder.is_dir():
        foreign = sorted({p.name for p in folder.iterdir()} - {TENSOR_FILE, VALUE_FILE})
        if foreign:
            raise ValueError(
                f"`folder` should hold a state alone, but {folder} holds other files "
                f"({some_of(foreign)}). Choose another folder: a state replaces all of it."
            )
    tensors: dict[str, Tensor] = {}
    plain = _encode(state, (), tensors, set())
    unfinished, replaced = _siblings(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        safetensors.torch.save_file(tensors, unfinished / TENSOR_FILE)
        document = {
            "format_version": FORMAT_VERSION,
            "sha256": {TENSOR_FILE: _hash_file(unfinished / TENSOR_FILE), "state": _hash(plain)},
            "state": plain,
        }
        text = json.dumps(document, indent=1, allow_nan=False)
        (unfinished / VALUE_FILE).write_text(text, encoding="ascii")
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if folder.exists():
        # A folder cannot be renamed onto another. `load_state` finds the old one meanwhile.
        shutil.rmtree(replaced, ignore_errors=True)
        folder.replace(replaced)
    unfinished.replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def load_state(folder: str | os.PathLike[str]) -> State:
    """Returns the state that :func:`save_state` wrote, checked to be complete and unaltered.

    :param folder: the folder of the state.
    :return: the state, its tensors on the CPU.
    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if a file is truncated or altered, or of another format version.
    """
    folder = Path(folder).resolve()
    _, replaced = _siblings(folder)
    if not folder.exists() and replaced.is_dir():  # interrupted between two renames
        folder = replaced
    for name in (VALUE_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no state: {name} is missing. Pass the folder that `save` was "
                "given."
            )
    altered = "is truncated or altered. Use another copy of the state, or train from the start."
    try:
        document = json.loads((folder / VALUE_FILE).read_text(encoding="ascii"))
    except ValueError as error:  # of JSON, and of the encoding
        raise ValueError(f"{folder / VALUE_FILE} {altered} ({error})") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / VALUE_FILE} should have format version {FORMAT_VERSION}, but has "
            f"{version!r}. Load the state with the release that wrote it."
        )
    check_keys(document, {"format_version", "sha256", "state"}, str(folder / VALUE_FILE))
    hashes = document["sha256"]
    check_keys(hashes, {TENSOR_FILE, "state"}, f"{folder / VALUE_FILE}, `sha256`")
    if _hash(document["state"]) != hashes["state"]:
        raise ValueError(f"{folder / VALUE_FILE} {altered} (its checksum is wrong)")
    data = (folder / TENSOR_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != hashes[TENSOR_FILE]:
        raise ValueError(f"{folder / TENSOR_FILE} {altered} (its checksum is wrong)")
    state: State = _decode(document["state"], safetensors.torch.load(data))
    return state


def has_state(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds a state.

    :param folder: the folder; an interrupted replacement of its state counts.
    """
    folder = Path(folder).resolve()
    places = (folder, _siblings(folder)[1]) if not folder.exists() else (folder,)
    return any((place / VALUE_FILE).is_file() for place in places)


def _siblings(folder: Path) -> tuple[Path, Path]:
    """Returns the path of the unfinished new folder, and of the old one during the renames."""
    return (
        folder.with_name(folder.name + ".unfinished"),
        folder.with_name(folder.name + ".replaced"),
    )


def _hash(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _encode(
    value: Any, path: tuple[str, ...], tensors: dict[str, Tensor], storages: set[int]
) -> Any:
    """Returns a value as JSON can hold it; tensors go to ``tensors`` and leave their name.

    A value that JSON does not know becomes a dictionary of one key that begins with ``$``; such
    keys of the state itself get a second ``$``.
    """
    if isinstance(value, Tensor):
        name = "/".join(path).encode("utf-8", "backslashreplace").decode()
        while name in tensors or name == "__metadata__":  # of safetensors
            name += "'"
        tensors[name] = _plain_tensor(value, path, storages)
        return {"$tensor": name}
    if isinstance(value, dict):
        encoded = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{_place(path)} should have strings as keys, but has {key!r} "
                    f"({type(key).__name__}). Convert it with str()."
                )
            escaped = "$" + key if key.startswith("$") else key
            encoded[escaped] = _encode(item, (*path, key), tensors, storages)
        return encoded
    if isinstance(value, list):
        return [_encode(v, (*path, str(i)), tensors, storages) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    for kind in (str, int):
        if isinstance(value, kind):
            return kind(value)
    hint = " Pass a list." if isinstance(value, tuple) else ""
    raise TypeError(
        f"{_place(path)} should be a dict, list, tensor, str, int, float, bool or None, but is a "
        f"{type(value).__name__}.{hint}"
    )


def _plain_tensor(value: Tensor, path: tuple[str, ...], storages: set[int]) -> Tensor:
    if value.layout != torch.strided or value.dtype not in _DTYPES or value.is_meta:
        raise TypeError(
            f"{_place(path)} should be a dense tensor of a usual dtype, but has dtype "
            f"{value.dtype}, layout {value.layout} and device {value.device}. Convert it."
        )
    tensor = value.detach().cpu().contiguous()
    storage = tensor.untyped_storage().data_ptr()
    if storage in storages:  # safetensors refuses tensors that overlap
        tensor = tensor.clone()
    storages.add(storage)
    return tensor


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, item),) = value.items()
        if key == "$tensor":
            return tensors[item]
        if key == "$float":
            return float(item)
    return {
        key[1:] if key.startswith("$$") else key: _decode(item, tensors)
        for key, item in value.items()
    }


def _place(path: tuple[str, ...]) -> str:
    return f"`state[{']['.join(map(repr, path))}]`" if path else "`state`"


__all__ = ["FORMAT_VERSION", "TENSOR_FILE", "VALUE_FILE", "has_state", "load_state", "save_state"]
