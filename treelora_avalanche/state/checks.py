"""Type of a state, and checks of one that was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

State = dict[str, Any]
"""Nested dictionaries (keys are strings) and lists of tensors, str, int, float, bool and None."""

_NAMED_AT_MOST = 3


def check_keys(
    found: Mapping[str, Any], expected: Iterable[str], where: str, remedy: str = ""
) -> None:
    """Raises an error that names missing and unknown keys.

    :param found: the dictionary that was read.
    :param expected: the keys that it should have.
    :param where: name of the dictionary in the message.
    :param remedy: what to do, a sentence.
    :raises ValueError: if the keys differ, or ``found`` is no dictionary.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} should be a dictionary, but is a {type(found).__name__}.")
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


def check_same_settings(found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises an error that names an argument that differs from the one in the state.

    :param found: the dictionary that was read; it may hold more.
    :param here: the arguments of the object that loads it, by name.
    :raises ValueError: if one differs.
    """
    for name, value in here.items():
        if found[name] != value:
            raise ValueError(
                f"`{name}` should be {found[name]}, as in the state, but is {value}. Build it with "
                f"{name}={found[name]} to continue."
            )


def check_same_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, remedy: str
) -> None:
    """Raises an error that names the tensors whose name, shape or dtype differ.

    :param found: the tensors that were read.
    :param expected: tensors of the expected names, shapes and dtypes.
    :param where: name of the tensors in the message.
    :param remedy: what to do, a sentence.
    :raises ValueError: if something differs.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} should be a dictionary, but is a {type(found).__name__}.")
    differences = [
        f"{name} is {_shape(found.get(name))} in the state and {_shape(expected.get(name))} here"
        for name in (*expected, *(name for name in found if name not in expected))
        if _shape(found.get(name)) != _shape(expected.get(name))
    ]
    if differences:
        raise ValueError(f"{where} do not fit: {some_of(differences, '; ')}. {remedy}")


def _shape(tensor: Any) -> str:
    if tensor is None:
        return "missing"
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def some_of(names: list[str], separator: str = ", ") -> str:
    """Returns the first few names, and the number of the others.

    :param names: the names.
    :param separator: separator between them.
    """
    more = len(names) - _NAMED_AT_MOST
    rest = f"{separator}and {more} more" if more > 0 else ""
    return separator.join(names[:_NAMED_AT_MOST]) + rest


def clone_state(state: Any) -> Any:
    """Returns a copy of a state that shares no tensor with it.

    :param state: a state, or a part of one.
    """
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: clone_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [clone_state(value) for value in state]
    return state


__all__ = ["State", "check_keys", "check_same_tensors", "clone_state", "some_of"]
