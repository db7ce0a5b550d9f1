"""State of the global random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from treelora_avalanche.state.checks import State, check_keys, check_same_tensors


def random_state() -> State:
    """Returns the state of the global generators of Python, numpy and torch, on CPU and CUDA."""
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
        # Reading it would initialise CUDA in a run that does not use it.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def check_random_state(state: State) -> None:
    """Raises an error if a state of the random generators is incomplete; changes nothing.

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
        "Use the library versions that saved it.",
    )


def _random_tensors(state: State) -> dict[str, Any]:
    return {
        "python": state["python"]["internal"],
        "numpy": state["numpy"]["keys"],
        "torch": state["torch"],
    }


def set_random_state(state: State) -> None:
    """Sets the global generators to a state.

    Generators of missing GPUs are skipped; those of GPUs that the state does not know are
    unchanged.

    :param state: what :func:`random_state` returned.
    :raises ValueError: if keys are missing or unknown; the generators are then unchanged.
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


__all__ = ["check_random_state", "random_state", "set_random_state"]
