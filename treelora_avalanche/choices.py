"""Errors for names that are not known, with the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error: `` Did you mean 'x'?``, or nothing where none is near.

    :param name: the name received.
    :param known: the names there are.
    """
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise an error naming the known names and the nearest match, if `name` is none of them.

    :param what: what is named, as the user writes it.
    :param name: the name received.
    :param known: the names there are.
    :raises ValueError: if it is none of them.
    """
    known = list(known)
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}.{hint}")
