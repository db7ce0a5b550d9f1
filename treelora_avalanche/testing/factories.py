"""Factories of the strategy, model and benchmark under test, importable in a new process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any

from avalanche.training.determinism.rng_manager import RNGManager
from torch import nn

from treelora_avalanche.state import random_state, set_random_state
from treelora_avalanche.testing.tiny import tiny_benchmark, tiny_vit

Factory = Callable[..., Any] | str
SEED = 0


@dataclass(frozen=True)
class Factories:
    """The functions that build a strategy, its model and its stream.

    Each is a function at the top level of a module, a ``functools.partial`` of one, or a reference
    ``"module:name"``: a new process must be able to import it. A lambda works in every check but
    :func:`check_new_process`.

    >>> factories = Factories("my_methods:make")
    >>> strategy, benchmark = factories.build()

    :param make_strategy: ``make_strategy(model) -> strategy``.
    :param make_model: returns the pretrained model, with the same weights at every call.
    :param benchmark: returns an Avalanche benchmark with a train and a test stream; or such a
        benchmark, if the strategy does not need its past experiences to continue.
    """

    make_strategy: Factory
    make_model: Factory = tiny_vit
    benchmark: Any = tiny_benchmark

    def build(self) -> tuple[Any, Any]:
        """Returns a new strategy and its benchmark; the global random state stays as it is."""
        with seeded():
            benchmark = self._benchmark()
            model: nn.Module = resolve(self.make_model)()
        with seeded():
            return resolve(self.make_strategy)(model), benchmark

    def _benchmark(self) -> Any:
        is_factory = callable(self.benchmark) or isinstance(self.benchmark, str)
        return resolve(self.benchmark)() if is_factory else self.benchmark

    def importable(self) -> Factories:
        """Returns the factories in the form that a new process receives.

        :raises ValueError: if one cannot be imported there.
        """
        is_factory = callable(self.benchmark) or isinstance(self.benchmark, str)
        sent = self if is_factory else replace(self, benchmark=_no_benchmark)
        for name in ("make_strategy", "make_model", "benchmark"):
            try:
                pickle.dumps(getattr(sent, name))
            except Exception as error:
                raise ValueError(
                    f"`{name}` should be importable in a new process, but is "
                    f"{getattr(sent, name)!r}. Define it at the top level of a module, or pass "
                    "'module:name'."
                ) from error
        return sent


def _no_benchmark() -> None:
    """Stands for a benchmark that cannot be built again."""


def resolve(factory: Factory) -> Callable[..., Any]:
    """Returns a factory, imported if it is a reference.

    :param factory: a callable, or ``"module:name"``.
    :raises ValueError: if the reference names no callable.
    """
    if not isinstance(factory, str):
        return factory
    try:
        found = EntryPoint("factory", factory, group="").load()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"a factory should be a function or a reference 'module:name', but is {factory!r}, "
            f"which cannot be imported ({error}). Check both names and the path."
        ) from error
    if not callable(found):
        raise ValueError(
            f"a factory should be a function, but {factory!r} is a {type(found).__name__}. Pass "
            "the function's name."
        )
    return found  # type: ignore[no-any-return]


@contextmanager
def seeded() -> Iterator[None]:
    """Seeds the global random generators inside the context, and restores them after it."""
    before = random_state()
    RNGManager.set_random_seeds(SEED)
    try:
        yield
    finally:
        set_random_state(before)
