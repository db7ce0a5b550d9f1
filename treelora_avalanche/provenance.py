"""Provenance of a result: versions, git hash and hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from treelora_avalanche._version import __version__

VERSIONED = ("torch", "avalanche-lib", "timm", "peft", "transformers", "numpy")


def versions() -> dict[str, str | None]:
    """Returns the versions of Python, of this package and of its dependencies; None if absent."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "treelora-avalanche": __version__,
        **{package: version_of(package) for package in VERSIONED},
    }


@cache
def git_hash() -> str | None:
    """Returns the commit of this package's git checkout; None outside of one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout, which does not track it.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: torch.device) -> dict[str, Any]:
    """Returns the hardware of a run.

    :param device: device of the model.
    """
    return {
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
