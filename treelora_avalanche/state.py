"""State as plain files: all tensors in one safetensors file, everything else in one JSON file.

A state is a dictionary of nested dictionaries and lists, with tensors, strings, numbers, booleans
and None at the ends. Nothing is pickled, so a state of unknown origin can be read without running
what it holds, and any other program can read it too. A folder is written beside its place and then
renamed: whatever happens meanwhile, either the old state or the new one is there, and whole.

Beside the files, this module reads and writes what every strategy has: an optimizer's state by the
names of its parameters, the state of the global random generators, and a fingerprint of a frozen
backbone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, Any]
"""Nested dictionaries (keys are strings) and lists of tensors, str, int, float, bool and None."""

FORMAT_VERSION = 1
TENSOR_FILE = "state.safetensors"
VALUE_FILE = "state.json"

_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip
_SAMPLES = 64
_NAMED_AT_MOST = 3


# --------------------------------------------------------------------------------------------------
# Files


def save_state(folder: str | os.PathLike[str], state: State) -> None:
    """Write a state as a folder of two files, whole or not at all.

    :param folder: where to; a state that is there already is replaced once the new one is complete.
    :param state: the state. Tensors come back on the CPU, contiguous and without gradient.
    :raises TypeError: if the state holds something that is neither a tensor nor a plain value; the
        message names its place.
    :raises ValueError: if ``folder`` is a file, or holds anything but a state.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` {folder} is a file; choose a folder for the state.")
    if folder.is_dir():
        foreign = sorted({p.name for p in folder.iterdir()} - {TENSOR_FILE, VALUE_FILE})
        if foreign:
            raise ValueError(
                f"`folder` {folder} holds other files ({_some(foreign)}), and a state replaces its "
                "folder as a whole; choose a folder for the state alone."
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
        # No folder can be renamed onto another. `load_state` knows where the old one waits.
        shutil.rmtree(replaced, ignore_errors=True)
        folder.replace(replaced)
    unfinished.replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def load_state(folder: str | os.PathLike[str]) -> State:
    """Read what :func:`save_state` has written, and check that it is complete and unaltered.

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
    altered = "is truncated or altered; use another copy of the state, or train from the start."
    try:
        document = json.loads((folder / VALUE_FILE).read_text(encoding="ascii"))
    except ValueError as error:  # of JSON, and of the encoding
        raise ValueError(f"{folder / VALUE_FILE} {altered} ({error})") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / VALUE_FILE} has format version {version!r}, and this release reads version "
            f"{FORMAT_VERSION}; load the state with the release that wrote it."
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
    """Whether there is a state to load.

    :param folder: the folder of the state; an interrupted replacement of it counts.
    """
    folder = Path(folder).resolve()
    places = (folder, _siblings(folder)[1]) if not folder.exists() else (folder,)
    return any((place / VALUE_FILE).is_file() for place in places)


def _siblings(folder: Path) -> tuple[Path, Path]:
    """Where the new folder is written, and where the old one waits for the new to be in place."""
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
    """The value as JSON can hold it; tensors are put into ``tensors`` and leave their name.

    What JSON cannot say is a dictionary of one key that begins with ``$``; such keys of the state
    itself get a second ``$``.
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
                    f"{_place(path)} has the key {key!r} ({type(key).__name__}); keys must be "
                    "strings: convert it with str()."
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
    hint = "; pass a list" if isinstance(value, tuple) else ""
    raise TypeError(
        f"{_place(path)} is a {type(value).__name__}; a state holds dicts, lists, tensors, str, "
        f"int, float, bool and None{hint}."
    )


def _plain_tensor(value: Tensor, path: tuple[str, ...], storages: set[int]) -> Tensor:
    if value.layout != torch.strided or value.dtype not in _DTYPES or value.is_meta:
        raise TypeError(
            f"{_place(path)} is a tensor that cannot be saved (dtype {value.dtype}, layout "
            f"{value.layout}, device {value.device}); convert it to a dense one of a usual dtype."
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


# --------------------------------------------------------------------------------------------------
# Dictionaries


def check_keys(
    found: Mapping[str, Any], expected: Iterable[str], where: str, remedy: str = ""
) -> None:
    """Raise an error that names the keys which are missing and those which are too many.

    :param found: what was read.
    :param expected: the keys that it should have.
    :param where: what was read, in the words of the message.
    :param remedy: what to do, a sentence.
    :raises ValueError: if the keys differ, or ``found`` is no dictionary.
    """
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{where} should be a dictionary of keys and values, and is a {type(found).__name__}."
        )
    expected = set(expected)
    parts = [
        f"{verb} {'key' if len(keys) == 1 else 'keys'} {', '.join(map(repr, keys))}"
        for verb, keys in (
            ("lacks the", sorted(expected - set(found))),
            ("has the unknown", sorted(set(found) - expected)),
        )
        if keys
    ]
    if parts:
        raise ValueError(f"{where} {' and '.join(parts)}. {remedy}".rstrip())


def check_same_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, remedy: str
) -> None:
    """Raise an error that names the tensors whose name, shape or dtype differ.

    :param found: what was read.
    :param expected: tensors of the names, shapes and dtypes that it should have.
    :param where: what was read, in the words of the message.
    :param remedy: what to do, a sentence.
    :raises ValueError: if something differs.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} should be a dictionary, and is a {type(found).__name__}.")
    differences = [
        f"{name} is {_shape(found.get(name))} in the state and {_shape(expected.get(name))} here"
        for name in (*expected, *(name for name in found if name not in expected))
        if _shape(found.get(name)) != _shape(expected.get(name))
    ]
    if differences:
        raise ValueError(f"{where} do not fit: {_some(differences, '; ')}. {remedy}")


def _shape(tensor: Any) -> str:
    if tensor is None:
        return "missing"
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _some(names: list[str], separator: str = ", ") -> str:
    more = len(names) - _NAMED_AT_MOST
    rest = f"{separator}and {more} more" if more > 0 else ""
    return separator.join(names[:_NAMED_AT_MOST]) + rest


def clone_state(state: Any) -> Any:
    """A copy of a state that shares no tensor with it.

    :param state: a state, or a part of one.
    """
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: clone_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [clone_state(value) for value in state]
    return state


# --------------------------------------------------------------------------------------------------
# The backbone


def backbone_fingerprint(model: nn.Module) -> dict[str, str]:
    """Fingerprint of the frozen parameters of a model: the same on every device.

    The sum of all bits, and a sample of values in order; one pass over memory, without copies. What
    is trained has no part in it, nor has the choice of layers that carry LoRA.

    :param model: a model, with or without LoRA.
    :return: ``structure``, of names, shapes and dtypes, and ``values``, as hexadecimal digits.
    """
    frozen = {
        # peft renames the layers that it adapts.
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in nn.Module.named_parameters(model)
        # The classifier that peft set aside for a trained copy is random, and computes nothing.
        if not parameter.requires_grad and ".original_module." not in name
    }
    names = sorted(frozen)
    structure = [(name, tuple(frozen[name].shape), str(frozen[name].dtype)) for name in names]
    digest = hashlib.sha256()
    parts = [_sum_and_sample(frozen[name]) for name in names if frozen[name].numel()]
    if parts:
        # One transfer for each device.
        for device in sorted({part.device for part in parts}, key=str):
            on_device = torch.cat([part for part in parts if part.device == device]).cpu()
            digest.update(on_device.numpy().tobytes())
    return {
        "structure": hashlib.sha256(repr(structure).encode()).hexdigest(),
        "values": digest.hexdigest(),
    }


def _sum_and_sample(tensor: Tensor) -> Tensor:
    """Sum of the bits as integers, which no order of summation changes; then some of them."""
    flat = tensor.contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    size = 8 if flat.nbytes % 8 == 0 else flat.element_size()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = flat.view(integer)
    step = max(1, len(bits) // _SAMPLES)
    return torch.cat((bits.sum(dtype=torch.int64)[None], bits[::step].to(torch.int64)))


# --------------------------------------------------------------------------------------------------
# The optimizer


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> State:
    """The state of an optimizer, by names of parameters in place of their positions.

    :param optimizer: any optimizer of ``torch.optim``'s kind.
    :param parameters: the model's parameters by name.
    """
    named = _named_parameters(optimizer, parameters)
    name_of = {id(parameter): name for name, parameter in named.items()}
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {
                "parameters": [name_of[id(parameter)] for parameter in group["params"]],
                "options": {
                    key: list(value) if isinstance(value, tuple) else value
                    for key, value in group.items()
                    if key != "params"
                },
            }
            for group in optimizer.param_groups
        ],
        "state": {
            name_of[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()
        },
    }


def check_optimizer_state(
    optimizer: Optimizer, state: State, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raise an error if a state does not fit an optimizer; changes nothing.

    :param optimizer: the optimizer.
    :param state: what :func:`optimizer_state` returned.
    :param parameters: the model's parameters by name.
    :raises ValueError: if the class, the groups or the parameters differ.
    """
    check_keys(state, {"class", "groups", "state"}, "the optimizer's state")
    if state["class"] != type(optimizer).__name__:
        raise ValueError(
            f"the state is of the optimizer {state['class']}, and this strategy has "
            f"{type(optimizer).__name__}; build it with the same optimizer."
        )
    groups = state["groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimizer has {len(groups)} parameter groups in the state, and "
            f"{len(optimizer.param_groups)} here; build it with the same groups."
        )
    named = _named_parameters(optimizer, parameters)
    name_of = {id(parameter): name for name, parameter in named.items()}
    for index, (saved, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        check_keys(saved, {"parameters", "options"}, f"the optimizer's group {index}")
        # Avalanche adds parameters to a fresh optimizer, so the state may well name more.
        unknown = [name for name in saved["parameters"] if name not in named]
        lost = {name_of[id(p)] for p in own["params"]} - set(saved["parameters"])
        if unknown or lost:
            raise ValueError(
                f"the optimizer's group {index} has other parameters in the state than here: "
                f"{_some(sorted({*unknown, *lost}))}; build it with the same groups."
            )
    listed = {name for group in groups for name in group["parameters"]}
    stray = sorted(set(state["state"]) - listed)
    if stray:
        raise ValueError(f"the optimizer's state is of parameters in no group: {_some(stray)}.")


def load_optimizer_state(
    optimizer: Optimizer, state: State, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Put a state into an optimizer; it holds copies of the state's tensors then.

    :param optimizer: the optimizer; its groups get exactly the state's parameters.
    :param state: what :func:`optimizer_state` returned.
    :param parameters: the model's parameters by name.
    :raises ValueError: if the state does not fit; the optimizer is then as it was.
    """
    check_optimizer_state(optimizer, state, parameters)
    named = _named_parameters(optimizer, parameters)
    position: dict[str, int] = {}
    groups = []
    for own, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        for name in saved["parameters"]:
            position[name] = len(position)
        options = {
            key: tuple(value) if isinstance(own.get(key), tuple) else value
            for key, value in saved["options"].items()
        }
        groups.append({**options, "params": [position[name] for name in saved["parameters"]]})
        own["params"] = [named[name] for name in saved["parameters"]]
    values = {position[name]: clone_state(value) for name, value in state["state"].items()}
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def _named_parameters(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """The model's parameters, and under their position those that the optimizer has beside them."""
    named = dict(parameters)
    known = {id(parameter) for parameter in named.values()}
    for g, group in enumerate(optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                named[f"group {g}, parameter {p}"] = parameter
    return named


# --------------------------------------------------------------------------------------------------
# Random generators


def random_state() -> State:
    """The state of the global generators of Python, numpy and torch, on the CPU and on CUDA."""
    version, internal, gauss_next = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {
            "version": version,
            "internal": torch.tensor(internal, dtype=torch.int64),
            "gauss_next": gauss_next,
        },
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "torch": torch.get_rng_state(),
        # Asking for it would wake up CUDA in a run that does not use it.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def check_random_state(state: State) -> None:
    """Raise an error if a state of the random generators is incomplete; changes nothing.

    :param state: what :func:`random_state` returned.
    :raises ValueError: if keys are missing or unknown.
    """
    check_keys(state, {"python", "numpy", "torch", "cuda"}, "the random state")
    check_keys(state["python"], {"version", "internal", "gauss_next"}, "the random state of Python")
    check_keys(
        state["numpy"],
        {"keys", "position", "has_gauss", "cached_gaussian"},
        "the random state of numpy",
    )
    check_same_tensors(
        _random_tensors(state),
        _random_tensors(random_state()),
        "the tensors of the random state",
        "It was saved with other versions of the libraries; use those.",
    )


def _random_tensors(state: State) -> dict[str, Any]:
    return {
        "python": state["python"]["internal"],
        "numpy": state["numpy"]["keys"],
        "torch": state["torch"],
    }


def set_random_state(state: State) -> None:
    """Put the global generators into a state.

    The generators of GPUs that are not there are left out, and those of GPUs that the state does
    not know stay as they are.

    :param state: what :func:`random_state` returned.
    :raises ValueError: if keys are missing or unknown; the generators are then as they were.
    """
    check_random_state(state)
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss_next"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        ("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gaussian"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(generator.cpu(), device)


__all__ = [
    "FORMAT_VERSION",
    "TENSOR_FILE",
    "VALUE_FILE",
    "State",
    "backbone_fingerprint",
    "check_keys",
    "check_optimizer_state",
    "check_random_state",
    "check_same_tensors",
    "clone_state",
    "has_state",
    "load_optimizer_state",
    "load_state",
    "optimizer_state",
    "random_state",
    "save_state",
    "set_random_state",
]
