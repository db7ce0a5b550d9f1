"""The values that named arguments allow, and the check of them.

Nothing heavy is imported here: the command line reads these for its help.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

HEADS = ("linear", "task_adaptive", "task_adaptive_ensemble", "task_adaptive_trained")
INFERENCE = ("merged", "last", "routed")
MERGES = ("none", "mean", "ties", "magmax")
SELECTIONS = ("lcb", "nearest", "random")
PRECISIONS = ("fp32", "bf16", "auto")
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("constant", "cosine")
TEXT_METRICS = ("accuracy", "rouge_l", "edit_similarity", "sari")
TRACE_VARIANTS = ("500", "1000", "5000")
EXECUTORS = ("processes", "slurm")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a hint to append to an error: `` Did you mean 'x'?``, or nothing if none is near.

    :param name: the name received.
    :param known: the known names.
    """
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raises an error that lists the known names and the nearest match.

    >>> check_known("`precision`", "bf61", PRECISIONS)
    Traceback (most recent call last):
    ValueError: `precision` should be one of fp32, bf16, auto, but is 'bf61'. Did you mean 'bf16'?

    :param what: the argument, as the user writes it.
    :param name: the value received.
    :param known: the allowed values.
    :raises ValueError: if the value is not allowed.
    """
    known = list(known)
    if name not in known:
        hint = did_you_mean(str(name), known)
        raise ValueError(f"{what} should be one of {', '.join(known)}, but is {name!r}.{hint}")


def check_model_folder(folder: Path) -> None:
    """Raises an error for a folder that lacks a file of a transformers model.

    :param folder: an existing folder.
    :raises FileNotFoundError: if there is no ``config.json``, or there are no safetensors.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"`name_or_folder` should hold a config.json, but {str(folder)!r} does not. Pass a "
            "folder that `save_pretrained` has written."
        )
    if not any(folder.glob("*.safetensors")):
        others = sorted(f.name for end in ("*.bin", "*.pt", "*.pth") for f in folder.glob(end))
        found = f" (found {', '.join(others)}, which may hold code)" if others else ""
        raise FileNotFoundError(
            f"`name_or_folder` should hold weights in safetensors, but {str(folder)!r} does "
            f"not{found}. Load it with transformers if you trust it, and save it with "
            "`model.save_pretrained(folder)`."
        )
