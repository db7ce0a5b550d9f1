"""The methods that the command line knows, as an explicit table.

Nothing heavy is imported until a strategy is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from treelora_avalanche.defaults import L2P_LR
from treelora_avalanche.registry.entry_points import Registry, load_object
from treelora_avalanche.registry.families import (
    AVALANCHE,
    EVERY_WEIGHT,
    FROZEN,
    LORA,
    PROMPTS,
    REPLAY,
    STREAMING_LDA,
    UPPER_BOUND,
    Family,
    Rates,
    SharedArguments,
)
from treelora_avalanche.registry.settings import (
    METHOD_SETTINGS,
    SCENARIOS,
    TREE_SETTINGS,
    RunSettings,
)

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate

    from treelora_avalanche.registry.options import Option

VISION = frozenset({"vision"})
LANGUAGE = frozenset({"language"})
BOTH = VISION | LANGUAGE


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    >>> row = Method("my_package.strategies:MyLoRA", "LoRA, but mine", models=VISION)

    :param strategy: the strategy's class, ``"package.module:Class"``; imported when it is used. Its
        constructor's parameters, beyond those that all strategies share, are the method's options.
    :param description: one line.
    :param family: supplies the optimizer, the learning rate and the shared arguments.
    :param models: kinds of models that the method is defined for.
    :param options: values of options that make the row what it is.
    :param aliases: names of options whose parameters are called like a setting: by the name of the
        option that of the parameter.
    :param also_reads: settings with a meaning for it beyond those of its family.
    :param does_not_read: settings of its family without a meaning for it.
    :param rates: default learning rates, where they are not its family's.
    :param joint: whether it trains once, on all tasks together.
    """

    strategy: str
    description: str
    family: Family = LORA
    models: frozenset[str] = BOTH
    options: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    also_reads: frozenset[str] = frozenset()
    does_not_read: frozenset[str] = frozenset()
    rates: Rates | None = None
    joint: bool = False

    @property
    def reads(self) -> frozenset[str]:
        """Settings with a meaning for it, of those that not all methods read."""
        return (self.family.reads | self.also_reads) - self.does_not_read

    @property
    def ignores(self) -> frozenset[str]:
        """Settings without a meaning for it."""
        return METHOD_SETTINGS - self.reads

    @property
    def kind(self) -> str:
        """The kind of its family, see :class:`Family`."""
        return self.family.kind

    @property
    def uses_lora(self) -> bool:
        """Whether an adapter is trained, to be stored after every task."""
        return self.family.uses_lora

    @property
    def on_all_seen(self) -> bool:
        """Whether it trains on the data of past tasks as much as on that of the present one."""
        return self.kind == UPPER_BOUND.kind

    @property
    def has_tree(self) -> bool:
        """Whether it is a form of TreeLoRA."""
        return self.reads >= TREE_SETTINGS

    @property
    def frozen(self) -> bool:
        """Whether it passes over the data of a task once and trains nothing by gradients."""
        return self.kind == FROZEN.kind

    def lr(self, settings: RunSettings) -> float | None:
        """Returns the learning rate: the settings' or the default.

        :param settings: the settings.
        """
        rates = self.rates or self.family.rates
        if settings.lr is not None:
            return settings.lr
        if settings.on_language:
            return rates.language
        return rates.digits if settings.on_digits and rates.digits else rates.vision

    def strategy_class(self) -> type[SupervisedTemplate]:
        """Imports the strategy's class."""
        found: type[SupervisedTemplate] = load_object(self.strategy)
        return found

    def own_options(self) -> dict[str, Option]:
        """Returns the options of its strategy's constructor; imports the strategy."""
        from treelora_avalanche.registry.options import own_options

        own = own_options(self.strategy_class(), SUPPLIED)
        named = {alias: own[parameter] for alias, parameter in self.aliases.items()}
        return named | {name: own[name] for name in own if name not in METHOD_SETTINGS}

    def build(self, given: SharedArguments) -> SupervisedTemplate:
        """Builds the strategy.

        :param given: the arguments that all strategies of the run share, and the method's options.
        :raises ValueError: if an argument is out of range or does not suit the model.
        """
        from treelora_avalanche.registry.options import check_options

        strategy, own = self.strategy_class(), given.options
        checked = check_options(strategy.__name__, own, self.own_options()) if own else {}
        renamed = {self.aliases.get(name, name): value for name, value in checked.items()}
        return self.family.build(strategy, given, self.reads, {**self.options, **renamed})


SUPPLIED = frozenset(
    {
        "model",
        "optimizer",
        "criterion",
        "plugins",
        "evaluator",
        "device",
        "eval_every",
        "seed",
        "peval_mode",
    }
    | {"train_mb_size", "train_epochs", "eval_mb_size", "accumulation_steps", "base_kwargs"}
    | {"slda_model", "input_size", "num_classes"}
)
"""Arguments of strategies that a run fills in."""

_OURS = "treelora_avalanche.strategies:"
_AVALANCHES = "avalanche.training:"

METHODS: Registry[Method] = Registry(
    "method",
    "treelora_avalanche.methods",
    Method,
    {
        "TreeLoRA": Method(
            _OURS + "TreeLoRAStrategy",
            "LoRA pulled towards the adapter of the most similar past task, found in a tree",
            also_reads=TREE_SETTINGS,
        ),
        "TreeLoRA-last": Method(
            _OURS + "TreeLoRAStrategy",
            "TreeLoRA with the adapter of the last task for inference, as in the paper",
            models=VISION,
            options={"inference": "last"},
            also_reads=TREE_SETTINGS,
        ),
        "TreeLoRA-routed": Method(
            _OURS + "TreeLoRAStrategy",
            "TreeLoRA with an adapter chosen for each sample by a router",
            models=VISION,
            options={"inference": "routed"},
            also_reads=TREE_SETTINGS,
        ),
        "SeqLoRA": Method(_OURS + "SeqLoRA", "plain LoRA, one adapter trained from task to task"),
        "EWCLoRA": Method(_OURS + "EWCLoRA", "LoRA with elastic weight consolidation, online"),
        "GEMLoRA": Method(_OURS + "GEMLoRA", "LoRA with gradient episodic memory"),
        "OGD": Method(
            _OURS + "OGD",
            "LoRA with gradients projected off those of past samples",
        ),
        "OLoRA": Method(
            _OURS + "OLoRA",
            "one LoRA per task, all in use, each orthogonal to those before",
        ),
        "InfLoRA": Method(
            _OURS + "InfLoRA",
            "one LoRA per task, all in use, each in the null space of past inputs",
        ),
        "L2P": Method(
            _OURS + "L2P",
            "prompts from one pool before the tokens, chosen per sample by nearest key",
            family=PROMPTS,
            rates=Rates(vision=L2P_LR, language=PROMPTS.rates.language),
        ),
        "DualPrompt": Method(
            _OURS + "DualPrompt",
            "general prompts for all tasks and an expert prompt per task, chosen by nearest key",
            family=PROMPTS,
        ),
        "HiDePrompt": Method(
            _OURS + "HiDePrompt",
            "a prompt per task, chosen by a classifier of frozen features; head on centroids",
            family=PROMPTS,
            models=VISION,
            does_not_read=frozenset({"head"}),
        ),
        "HiDeLoRA": Method(
            _OURS + "HiDeLoRA",
            "a LoRA per task (keys, values), chosen by a classifier of frozen features",
            does_not_read=frozenset({"head", "target_modules"}),
        ),
        "SAPT": Method(
            _OURS + "SAPT",
            "one LoRA per task, all in use, weighted by an attention of the prompt over the tasks",
            models=LANGUAGE,
        ),
        "TaSL": Method(
            _OURS + "TaSL",
            "LoRA whose matrices are averaged with those before the task, by their importance",
            models=LANGUAGE,
        ),
        "L2Anchor": Method(
            _OURS + "L2Anchor",
            "LoRA pulled, in squared L2, towards the adapter of the task before: a control",
        ),
        "Naive": Method(
            _AVALANCHES + "Naive", "fine-tuning of every weight, without LoRA", family=EVERY_WEIGHT
        ),
        "LwF": Method(
            _AVALANCHES + "LwF",
            "LoRA with learning without forgetting",
            family=AVALANCHE,
            options={"alpha": 1.0, "temperature": 2.0},
            aliases={"distillation_alpha": "alpha"},
        ),
        "Replay": Method(
            _AVALANCHES + "Replay",
            "LoRA with stored samples, mixed into every batch",
            family=REPLAY,
            options={"mem_size": 200},
        ),
        "FrozenNCM": Method(
            _OURS + "FrozenNCM",
            "nearest class mean on the features of the untrained backbone",
            family=FROZEN,
            models=VISION,
        ),
        "FrozenGaussian": Method(
            _OURS + "FrozenGaussian",
            "the task-adaptive head on the features of the untrained backbone",
            family=FROZEN,
            models=VISION,
        ),
        "InContext": Method(
            _OURS + "InContext",
            "demonstrations of the nearest task in the prompt of the untrained model (FIX)",
            family=FROZEN,
            models=LANGUAGE,
        ),
        "StreamingLDA": Method(
            _AVALANCHES + "StreamingLDA",
            "Avalanche's streaming discriminant analysis on the untrained backbone",
            family=STREAMING_LDA,
            models=VISION,
        ),
        "Cumulative": Method(
            _AVALANCHES + "Cumulative",
            "LoRA trained on all data seen so far, again after every task",
            family=UPPER_BOUND,
        ),
        "JointTraining": Method(
            _AVALANCHES + "JointTraining",
            "LoRA trained once, on the data of all tasks together",
            family=UPPER_BOUND,
            joint=True,
        ),
    },
)
"""All methods by name; other packages add theirs by the entry points
``treelora_avalanche.methods``."""


def check_models(methods: Iterable[str], settings: RunSettings) -> None:
    """Raises an error if the scenario's kind of model is not one that a method is defined for.

    :param methods: names of the methods.
    :param settings: the settings.
    :raises ValueError: if a name is unknown, or a method is not defined for the kind of model.
    """
    kind = "language" if SCENARIOS[settings.scenario].language else "vision"
    for name in methods:
        if kind not in METHODS[name].models:
            possible = ", ".join(n for n, entry in METHODS.loadable() if kind in entry.models)
            raise ValueError(
                f"`--scenario {settings.scenario}` is for {kind} models, but {name} is not defined "
                f"for them. Possible: {possible}."
            )


__all__ = ["BOTH", "LANGUAGE", "METHODS", "VISION", "Method", "check_models"]
