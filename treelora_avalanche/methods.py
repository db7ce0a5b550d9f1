"""The methods that the command line knows, as an explicit table.

Nothing heavy is imported until a method is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from .names import check_known
from .settings import RunSettings

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate
    from torch import nn


TREE_OPTIONS = frozenset({"tree_lambda", "selection", "depth", "max_adapters"})
LORA_OPTIONS = frozenset({"rank", "alpha", "layers", "target_modules"})


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    description: str
    build: Callable[[nn.Module, RunSettings, float, int, dict[str, Any]], SupervisedTemplate]
    """ From model, settings, learning rate, seed and the arguments that all methods share. """
    lr: float
    """ Learning rate (Adam) where the user gives none: the paper's, for LoRA. """
    digits_lr: float | None = None
    """ The same for the digits, chosen for every method by one rule: the best class-incremental
    accuracy on a quarter of the training digits held out (three seeds, four epochs, batches of 24,
    which keeps the number of steps). At the paper's rate, meant for large images and batches of
    192, every method forgets nearly everything there. """
    ignores: frozenset[str] = frozenset()
    """ Settings without a meaning for this method. """
    uses_lora: bool = True
    """ Whether an adapter is trained, to be stored after every task. """
    state: str = "ready"


def _lora_arguments(settings: RunSettings, lr: float) -> dict[str, Any]:
    from torch.optim import Adam

    return {
        "optimizer": partial(Adam, lr=lr),
        "rank": settings.rank,
        "alpha": settings.alpha,
        "layers": settings.layers,
        "target_modules": settings.target_modules,
    }


def _build_treelora(
    model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
) -> SupervisedTemplate:
    from .strategies import TreeLoRAStrategy

    return TreeLoRAStrategy(
        model=model,
        tree_lambda=settings.tree_lambda,
        selection=settings.selection,
        depth=settings.depth,
        max_adapters=settings.max_adapters,
        seed=seed,
        **_lora_arguments(settings, lr),
        **shared,
    )


def _build_seq_lora(
    model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
) -> SupervisedTemplate:
    from .strategies import SeqLoRA

    return SeqLoRA(model=model, **_lora_arguments(settings, lr), **shared)


def _build_naive(
    model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
) -> SupervisedTemplate:
    from avalanche.training import Naive
    from torch.nn import CrossEntropyLoss
    from torch.optim import Adam

    from .plugins import FiniteLossPlugin

    plugins = [*shared["plugins"], FiniteLossPlugin()]
    return Naive(
        model=model,
        optimizer=Adam(model.parameters(), lr=lr),
        criterion=CrossEntropyLoss(),
        **{**shared, "plugins": plugins},
    )


METHODS: dict[str, Method] = {
    "TreeLoRA": Method(
        "LoRA pulled towards the adapter of the most similar past task, found in a tree",
        _build_treelora,
        lr=0.005,
        digits_lr=0.0003,
    ),
    "SeqLoRA": Method(
        "plain LoRA, one adapter trained from task to task",
        _build_seq_lora,
        lr=0.005,
        digits_lr=0.0003,
        ignores=TREE_OPTIONS,
    ),
    "Naive": Method(
        "Avalanche's fine-tuning of every weight, without LoRA",
        _build_naive,
        lr=0.0001,
        digits_lr=0.00005,
        ignores=TREE_OPTIONS | LORA_OPTIONS,
        uses_lora=False,
    ),
}


def find_method(name: str) -> Method:
    """The entry of a method, or an error naming the known ones.

    :param name: name of the method.
    """
    check_known("method", name, METHODS)
    return METHODS[name]


def method_config(method: str, seed: int, settings: RunSettings) -> dict[str, Any]:
    """What the outcome of a run depends on; two runs are the same where this is equal.

    Settings that the method does not look at are left out, and its learning rate is filled in. The
    keys are flags of `treelora train`.

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: everything else.
    """
    entry = find_method(method)
    config = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name not in entry.ignores
    }
    config["model"] = settings.model_name
    if settings.lr is None:
        on_digits = settings.scenario == "digits" and entry.digits_lr is not None
        config["lr"] = entry.digits_lr if on_digits else entry.lr
    return {"method": method, "seed": seed, **config}


__all__ = ["METHODS", "Method", "find_method", "method_config"]
