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

Build = Callable[["nn.Module", RunSettings, float, int, dict[str, Any]], "SupervisedTemplate"]

TREE_OPTIONS = frozenset({"tree_lambda", "selection", "depth", "max_adapters"})
LORA_OPTIONS = frozenset({"rank", "alpha", "layers", "target_modules"})
TRAINING_OPTIONS = frozenset({"head", "epochs", "lr"})

WITHOUT_CONSEQUENCE = frozenset({"download"})

LORA_LR = 0.005
""" The paper's, for LoRA. """
LORA_DIGITS_LR = 0.0003
REPLAY_SAMPLES = 200


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    description: str
    build: Build
    """ From model, settings, learning rate, seed and the arguments that all methods share. """
    lr: float | None
    """ Learning rate (Adam) where the user gives none. None: the method has none. """
    digits_lr: float | None = None
    """ The same for the digits, chosen by one rule: the best class-incremental accuracy on a
    quarter of the training digits held out (three seeds, four epochs, batches of 24, which keeps
    the number of steps). At the paper's rate, meant for large images and batches of 192, every
    method forgets nearly everything there. The rule was applied to plain LoRA, TreeLoRA and Naive;
    the other LoRA methods take plain LoRA's. """
    kind: str = "ours"
    """ ours; Avalanche's (run unchanged); frozen (the backbone is not trained); upper bound. """
    ignores: frozenset[str] = frozenset()
    """ Settings without a meaning for this method. """
    uses_lora: bool = True
    """ Whether an adapter is trained, to be stored after every task. """
    joint: bool = False
    """ Whether it trains once, on all tasks together. """
    keeps_to_itself: bool = False
    """ Whether the strategy keeps something from task to task outside of its plugins and of what it
    trains, which cannot be saved. """

    @property
    def on_all_seen(self) -> bool:
        """Whether it trains on the data of past tasks as much as on that of the present one."""
        return self.kind == "upper bound"

    @property
    def frozen(self) -> bool:
        """Whether it passes over the data of a task once and trains nothing by gradients."""
        return self.kind == "frozen"

    def epochs(self, settings: RunSettings) -> int:
        """Passes over the data of a task.

        :param settings: the settings.
        """
        return 1 if self.frozen else settings.epochs


# --------------------------------------------------------------------------------------------------
# Builders


def _lora_arguments(settings: RunSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in sorted(LORA_OPTIONS)}


def _head(settings: RunSettings) -> list[Any]:
    from .plugins import TaskAdaptiveHeadPlugin

    return [TaskAdaptiveHeadPlugin()] if settings.head == "task_adaptive" else []


def _our_lora(name: str, **fixed: Any) -> Build:
    """Builder of a LoRA strategy of ours.

    :param name: the strategy's class.
    :param fixed: arguments that make the row of the table what it is.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        from torch.optim import Adam

        from . import strategies

        # The head first, the same for all methods: it takes its statistics before anything else.
        plugins = [*_head(settings), *shared["plugins"]]
        strategy: SupervisedTemplate = getattr(strategies, name)(
            model=model,
            optimizer=partial(Adam, lr=lr),
            **_lora_arguments(settings),
            **fixed,
            **{**shared, "plugins": plugins},
        )
        return strategy

    return build


def _treelora(inference: str) -> Build:
    """Builder of TreeLoRA.

    :param inference: which adapter answers, see `TreeLoRAStrategy`.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        own = {name: getattr(settings, name) for name in sorted(TREE_OPTIONS)}
        builder = _our_lora("TreeLoRAStrategy", inference=inference, seed=seed, **own)
        return builder(model, settings, lr, seed, shared)

    return build


def _avalanches(name: str, *, lora: bool = True, joint: bool = False, **fixed: Any) -> Build:
    """Builder of a strategy of Avalanche, unchanged, trained with Adam.

    :param name: the strategy's class.
    :param lora: whether it trains LoRA, seen through its trainable parameters, or every weight.
    :param joint: whether it sees all tasks at once and so has no use for a head of ours.
    :param fixed: its own arguments.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        from avalanche import training
        from torch.nn import CrossEntropyLoss
        from torch.optim import Adam

        from .adapters import TrainableView, add_lora
        from .plugins import FiniteLossPlugin

        if lora:
            model = TrainableView(add_lora(model, **_lora_arguments(settings)))
        # On its device now: an optimizer made of parameters that move later would train copies.
        model.to(shared["device"])
        head = [] if joint else _head(settings)
        plugins = [*head, *shared["plugins"], FiniteLossPlugin()]
        strategy: SupervisedTemplate = getattr(training, name)(
            model=model,
            optimizer=Adam(model.parameters(), lr=lr),
            criterion=CrossEntropyLoss(),
            **fixed,
            **{**shared, "plugins": plugins},
        )
        return strategy

    return build


def _our_frozen(name: str) -> Build:
    """Builder of a strategy of ours that trains nothing.

    :param name: the strategy's class.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        from . import strategies

        kept = {k: v for k, v in shared.items() if k not in ("train_mb_size", "train_epochs")}
        strategy: SupervisedTemplate = getattr(strategies, name)(model=model, **kept)
        return strategy

    return build


def _streaming_lda(
    model: Any, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
) -> SupervisedTemplate:
    from avalanche.training import StreamingLDA
    from torch.nn import CrossEntropyLoss

    n_classes = model.num_classes
    model.reset_classifier(0)  # timm's way to a model that returns its features
    # Frozen, as it is used: Avalanche trains nothing here, and would keep the graph all the same.
    model.requires_grad_(False)
    strategy: SupervisedTemplate = StreamingLDA(
        slda_model=model,
        criterion=CrossEntropyLoss(),
        input_size=model.num_features,
        num_classes=n_classes,
        **shared,
    )
    return strategy


# --------------------------------------------------------------------------------------------------
# The table


METHODS: dict[str, Method] = {
    "TreeLoRA": Method(
        "LoRA pulled towards the adapter of the most similar past task, found in a tree",
        _treelora("last"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
    ),
    "TreeLoRA-routed": Method(
        "TreeLoRA whose samples are answered each by the adapter it seems to belong to",
        _treelora("routed"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
    ),
    "SeqLoRA": Method(
        "plain LoRA, one adapter trained from task to task",
        _our_lora("SeqLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        ignores=TREE_OPTIONS,
    ),
    "EWCLoRA": Method(
        "LoRA with elastic weight consolidation (online, λ = 50)",
        _our_lora("EWCLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        ignores=TREE_OPTIONS,
    ),
    "GEMLoRA": Method(
        "LoRA with gradient episodic memory (100 stored samples per task)",
        _our_lora("GEMLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        ignores=TREE_OPTIONS,
    ),
    "OGD": Method(
        "LoRA with gradients projected off those of past samples (200 per task, at most 1,000)",
        _our_lora("OGD"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        ignores=TREE_OPTIONS,
    ),
    "OLoRA": Method(
        "one LoRA per task, all in use, each orthogonal to those before (λ1 = 0.5)",
        _our_lora("OLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        ignores=TREE_OPTIONS,
    ),
    "InfLoRA": Method(
        "one LoRA per task, all in use, each fixed to where past inputs have no part (ε = 0.95)",
        _our_lora("InfLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        ignores=TREE_OPTIONS,
    ),
    "L2Anchor": Method(
        "LoRA pulled, in squared L2, towards the adapter of the task before: a control",
        _our_lora("L2Anchor"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        ignores=TREE_OPTIONS,
    ),
    "Naive": Method(
        "fine-tuning of every weight, without LoRA",
        _avalanches("Naive", lora=False),
        lr=0.0001,
        digits_lr=0.00005,
        kind="Avalanche's",
        ignores=TREE_OPTIONS | LORA_OPTIONS,
        uses_lora=False,
    ),
    "LwF": Method(
        "LoRA with learning without forgetting (α = 1, temperature 2)",
        _avalanches("LwF", alpha=1.0, temperature=2.0),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        kind="Avalanche's",
        ignores=TREE_OPTIONS,
    ),
    "Replay": Method(
        f"LoRA with {REPLAY_SAMPLES} stored samples, mixed into every batch",
        _avalanches("Replay", mem_size=REPLAY_SAMPLES),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        kind="Avalanche's",
        ignores=TREE_OPTIONS,
    ),
    "FrozenNCM": Method(
        "nearest class mean on the features of the untrained backbone",
        _our_frozen("FrozenNCM"),
        lr=None,
        kind="frozen",
        ignores=TREE_OPTIONS | LORA_OPTIONS | TRAINING_OPTIONS,
        uses_lora=False,
        keeps_to_itself=True,
    ),
    "FrozenGaussian": Method(
        "the task-adaptive head on the features of the untrained backbone",
        _our_frozen("FrozenGaussian"),
        lr=None,
        kind="frozen",
        ignores=TREE_OPTIONS | LORA_OPTIONS | TRAINING_OPTIONS,
        uses_lora=False,
        keeps_to_itself=True,
    ),
    "StreamingLDA": Method(
        "Avalanche's streaming discriminant analysis on the untrained backbone",
        _streaming_lda,
        lr=None,
        kind="frozen",
        ignores=TREE_OPTIONS | LORA_OPTIONS | TRAINING_OPTIONS,
        uses_lora=False,
        keeps_to_itself=True,
    ),
    "Cumulative": Method(
        "LoRA trained on all data seen so far, again after every task",
        _avalanches("Cumulative", joint=True),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        kind="upper bound",
        ignores=TREE_OPTIONS | {"head"},
        keeps_to_itself=True,
    ),
    "JointTraining": Method(
        "LoRA trained once, on the data of all tasks together",
        _avalanches("JointTraining", joint=True),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        kind="upper bound",
        ignores=TREE_OPTIONS | {"head"},
        joint=True,
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

    Settings that the method or the scenario does not look at are left out, and defaults that depend
    on them are filled in. The keys are flags of `treelora train`.

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: everything else.
    """
    entry = find_method(method)
    ignored = entry.ignores | settings.without_meaning | WITHOUT_CONSEQUENCE
    config = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name not in ignored
    }
    config["model"] = settings.model_name
    if "n_experiences" in config:
        config["n_experiences"] = settings.number_of_experiences
    if "lr" in config and settings.lr is None:
        on_digits = settings.scenario == "digits" and entry.digits_lr is not None
        config["lr"] = entry.digits_lr if on_digits else entry.lr
    return {"method": method, "seed": seed, **config}


__all__ = ["METHODS", "Method", "find_method", "method_config"]
