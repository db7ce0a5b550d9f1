"""Table of methods.

torch is not imported until a strategy is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

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
    SUBSPACES,
    UPPER_BOUND,
    WHOLE_MODEL,
    Family,
    Rates,
    SharedArguments,
)
from treelora_avalanche.registry.settings import (
    MERGE_SETTINGS,
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

LR_FACTOR = 10
"""The learning rates to choose from reach from 1 / 10 of the default to 10 times the default."""


class Strength(NamedTuple):
    """Option that weighs a method's own term, and the range that it is chosen from.

    >>> Strength("ewc_lambda", 1.0, 1e5)

    :param option: name of the option, or of the setting.
    :param low: lowest value; above 0, since values are drawn log-uniformly.
    :param high: highest value.
    :param models: kinds of models for which it has an effect.
    """

    option: str
    low: float
    high: float
    models: frozenset[str] = BOTH


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    >>> row = Method("my_package.strategies:MyLoRA", "LoRA with my penalty", models=VISION)

    :param strategy: class of the strategy, ``"package.module:Class"``; imported on first use. The
        parameters of its constructor, beyond those common to all strategies, are the method's
        options.
    :param description: one line.
    :param family: supplies the optimizer, the learning rate and the common arguments.
    :param models: kinds of models that the method is defined for.
    :param options: fixed values of options.
    :param aliases: parameters by name of the option, where a parameter has the name of a setting.
    :param also_reads: settings that it reads in addition to those of its family.
    :param does_not_read: settings of its family that it does not read.
    :param rates: default learning rates, if they differ from its family's.
    :param joint: whether it trains once, on all tasks together.
    :param strength: its strength, which ``treelora tune`` chooses after the learning rate.
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
    strength: Strength | None = None

    @property
    def reads(self) -> frozenset[str]:
        """Settings that it reads, of those that not all methods read."""
        return (self.family.reads | self.also_reads) - self.does_not_read

    @property
    def ignores(self) -> frozenset[str]:
        """Settings that it does not read."""
        return METHOD_SETTINGS - self.reads

    @property
    def kind(self) -> str:
        """Kind of its family, see :class:`Family`."""
        return self.family.kind

    @property
    def uses_lora(self) -> bool:
        """Whether an adapter is trained, and saved after every task."""
        return self.family.uses_lora

    @property
    def on_all_seen(self) -> bool:
        """Whether it trains on all data seen so far."""
        return self.kind == UPPER_BOUND.kind

    @property
    def has_tree(self) -> bool:
        """Whether it is a variant of TreeLoRA."""
        return self.reads >= TREE_SETTINGS

    @property
    def frozen(self) -> bool:
        """Whether it trains nothing by gradients, in one pass over the data of a task."""
        return self.kind == FROZEN.kind

    def lr(self, settings: RunSettings) -> float | None:
        """Returns the learning rate of the settings, or the default.

        :param settings: the settings.
        """
        rates = self.rates or self.family.rates
        if settings.lr is not None:
            return settings.lr
        if settings.on_language:
            return rates.language
        return rates.digits if settings.on_digits and rates.digits else rates.vision

    def search_space(self, settings: RunSettings) -> dict[str, tuple[float, float]]:
        """Returns the options that :command:`treelora tune` chooses, in its order, by range.

        :param settings: the method's settings; their learning rate is the middle of its range.
        """
        space = {}
        lr = self.lr(settings) if "lr" in self.reads else None
        if lr is not None:
            low, high = (float(f"{lr * factor:.3g}") for factor in (1 / LR_FACTOR, LR_FACTOR))
            space["lr"] = (low, high)
        kind = "language" if settings.on_language else "vision"
        if self.strength is not None and kind in self.strength.models:
            space[self.strength.option] = (self.strength.low, self.strength.high)
        return space

    def default_of(self, option: str, settings: RunSettings) -> Any:
        """Returns the default value of an option; imports the strategy.

        :param option: name of the option, or of a setting.
        :param settings: the method's settings.
        :return: None for a setting whose default the strategy knows.
        """
        if option in METHOD_SETTINGS:
            return getattr(settings, option)
        fixed = self.options.get(self.aliases.get(option, option))
        return self.own_options()[option].default if fixed is None else fixed

    def strategy_class(self) -> type[SupervisedTemplate]:
        """Imports and returns the strategy class."""
        found: type[SupervisedTemplate] = load_object(self.strategy)
        return found

    def own_options(self) -> dict[str, Option]:
        """Returns the options of the strategy's constructor; imports the strategy."""
        from treelora_avalanche.registry.options import own_options

        own = own_options(self.strategy_class(), SUPPLIED)
        named = {alias: own[parameter] for alias, parameter in self.aliases.items()}
        return named | {name: own[name] for name in own if name not in METHOD_SETTINGS}

    def build(self, given: SharedArguments) -> SupervisedTemplate:
        """Builds the strategy.

        :param given: the common arguments of the run, and the method's options.
        :raises ValueError: if an argument is out of range or does not fit the model.
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
"""Arguments of strategies that a run supplies."""

_OURS = "treelora_avalanche.strategies:"
_AVALANCHES = "avalanche.training:"
_TREE_STRENGTH = Strength("tree_lambda", 0.01, 10.0)

METHODS: Registry[Method] = Registry(
    "method",
    "treelora_avalanche.methods",
    Method,
    {
        "TreeLoRA": Method(
            _OURS + "TreeLoRAStrategy",
            "LoRA pulled towards the adapter of the most similar past task, found in a K-D tree",
            also_reads=TREE_SETTINGS,
            strength=_TREE_STRENGTH,
        ),
        "TreeLoRA-last": Method(
            _OURS + "TreeLoRAStrategy",
            "TreeLoRA that predicts with the adapter of the last task, as in the paper",
            options={"inference": "last"},
            also_reads=TREE_SETTINGS,
            strength=_TREE_STRENGTH,
        ),
        "TreeLoRA-routed": Method(
            _OURS + "TreeLoRAStrategy",
            "TreeLoRA that predicts with the adapter a router selects for each sample",
            options={"inference": "routed"},
            also_reads=TREE_SETTINGS,
            strength=_TREE_STRENGTH,
        ),
        "TreeLoRA-merged": Method(
            _OURS + "TreeLoRAStrategy",
            "TreeLoRA that predicts with the mean of all adapters",
            models=LANGUAGE,
            options={"inference": "merged"},
            also_reads=TREE_SETTINGS,
            strength=_TREE_STRENGTH,
        ),
        "SeqLoRA": Method(
            _OURS + "SeqLoRA",
            "plain LoRA: one adapter, trained sequentially",
            also_reads=MERGE_SETTINGS,
        ),
        "EWCLoRA": Method(
            _OURS + "EWCLoRA",
            "LoRA with online elastic weight consolidation",
            also_reads=MERGE_SETTINGS,
            strength=Strength("ewc_lambda", 1.0, 1e4),
        ),
        "GEMLoRA": Method(
            _OURS + "GEMLoRA",
            "LoRA with gradient episodic memory",
            also_reads=MERGE_SETTINGS,
            strength=Strength("memory_strength", 0.005, 1.0),
        ),
        "OGD": Method(
            _OURS + "OGD",
            "LoRA with steps projected orthogonally to the gradients of past samples",
            # On held-out training digits, of six rates by `treelora tune` (docs/methods.md).
            rates=LORA.rates._replace(digits=0.0005),
            also_reads=MERGE_SETTINGS,
        ),
        "OLoRA": Method(
            _OURS + "OLoRA",
            "one LoRA per task, summed, each orthogonal to the earlier ones",
            strength=Strength("orthogonality", 0.01, 10.0),
        ),
        "InfLoRA": Method(
            _OURS + "InfLoRA",
            "one LoRA per task, summed, each in the null space of past inputs",
            strength=Strength("threshold", 0.8, 0.99),
        ),
        "SDLoRA": Method(
            _OURS + "SDLoRA",
            "one LoRA per task, summed: past directions are frozen, all magnitudes trained",
        ),
        "OSF": Method(
            _OURS + "OSF",
            "full-rank training off the largest singular directions of each weight (peft's OSF)",
            family=SUBSPACES,
        ),
        "RanPAC": Method(
            _OURS + "RanPAC",
            "LoRA on the first task alone; ridge classifier on random projections of the features",
            models=VISION,
            does_not_read=frozenset({"head"}),
        ),
        "SLCA": Method(
            _OURS + "SLCA",
            "full fine-tuning, the backbone slowly; classifier aligned on class Gaussians",
            family=WHOLE_MODEL,
            models=VISION,
            does_not_read=frozenset({"head"}),
            strength=Strength("backbone_rate", 1e-3, 0.1),
        ),
        "L2P": Method(
            _OURS + "L2P",
            "prompts from a shared pool, selected per sample by the nearest keys",
            family=PROMPTS,
            rates=Rates(vision=L2P_LR, language=PROMPTS.rates.language),
            strength=Strength("sim_coefficient", 0.01, 10.0),
        ),
        "DualPrompt": Method(
            _OURS + "DualPrompt",
            "general prompts, and an expert prompt per task, selected by the nearest key",
            family=PROMPTS,
            strength=Strength("sim_coefficient", 0.01, 10.0),
        ),
        "HiDePrompt": Method(
            _OURS + "HiDePrompt",
            "a prompt per task, selected by a classifier of frozen features; head on centroids",
            family=PROMPTS,
            models=VISION,
            does_not_read=frozenset({"head"}),
            strength=Strength("contrast", 0.01, 1.0),
        ),
        "HiDeLoRA": Method(
            _OURS + "HiDeLoRA",
            "a LoRA per task (keys, values), selected by a classifier of frozen features",
            does_not_read=frozenset({"head"}),
            strength=Strength("contrast", 0.01, 1.0, VISION),
        ),
        "SAPT": Method(
            _OURS + "SAPT",
            "one LoRA per task, summed with weights from attention of the prompt over tasks",
            models=LANGUAGE,
            strength=Strength("distillation", 0.01, 10.0),
        ),
        "TaSL": Method(
            _OURS + "TaSL",
            "LoRA averaged with its state before the task, by the importance of its matrices",
            models=LANGUAGE,
            strength=Strength("past_weight", 0.1, 1.0),
        ),
        "L2Anchor": Method(
            _OURS + "L2Anchor",
            "LoRA with a squared L2 penalty towards the previous task's adapter (a control)",
            also_reads=MERGE_SETTINGS,
            strength=Strength("strength", 0.01, 100.0),
        ),
        "Naive": Method(
            _AVALANCHES + "Naive", "full fine-tuning, without LoRA", family=EVERY_WEIGHT
        ),
        "EWC": Method(
            _AVALANCHES + "EWC",
            "full fine-tuning with elastic weight consolidation",
            family=EVERY_WEIGHT,
            # Half of 400, that of TRACE's release, which halves its penalty.
            options={"ewc_lambda": 200.0, "mode": "online", "decay_factor": 1.0},
            strength=Strength("ewc_lambda", 1.0, 1e5),
        ),
        "GEM": Method(
            _AVALANCHES + "GEM",
            "full fine-tuning with gradient episodic memory",
            family=EVERY_WEIGHT,
            options={"patterns_per_exp": 100, "memory_strength": 0.05},
            strength=Strength("memory_strength", 0.005, 1.0),
        ),
        "LwF": Method(
            _AVALANCHES + "LwF",
            "LoRA with learning without forgetting",
            family=AVALANCHE,
            also_reads=MERGE_SETTINGS,
            options={"alpha": 1.0, "temperature": 2.0},
            aliases={"distillation_alpha": "alpha"},
            strength=Strength("distillation_alpha", 0.1, 10.0),
        ),
        "Replay": Method(
            _AVALANCHES + "Replay",
            "LoRA with a replay memory of past samples, mixed into every batch",
            family=REPLAY,
            also_reads=MERGE_SETTINGS,
            options={"mem_size": 200},
        ),
        "OnPolicyReplay": Method(
            _OURS + "OnPolicyReplay",
            "LoRA that also trains on its own generations for past prompts",
            models=LANGUAGE,
            also_reads=MERGE_SETTINGS,
        ),
        "FrozenNCM": Method(
            _OURS + "FrozenNCM",
            "nearest class mean on features of the frozen backbone",
            family=FROZEN,
            models=VISION,
        ),
        "FrozenGaussian": Method(
            _OURS + "FrozenGaussian",
            "task-adaptive head on features of the frozen backbone",
            family=FROZEN,
            models=VISION,
        ),
        "FrozenRanPAC": Method(
            _OURS + "FrozenRanPAC",
            "ridge classifier on random projections of the frozen backbone's features",
            family=FROZEN,
            models=VISION,
        ),
        "InContext": Method(
            _OURS + "InContext",
            "demonstrations of the nearest task in the prompt of the frozen model (FIX)",
            family=FROZEN,
            models=LANGUAGE,
        ),
        "StreamingLDA": Method(
            _AVALANCHES + "StreamingLDA",
            "streaming linear discriminant analysis on features of the frozen backbone",
            family=STREAMING_LDA,
            models=VISION,
            strength=Strength("shrinkage_param", 1e-6, 0.1),
        ),
        "Cumulative": Method(
            _AVALANCHES + "Cumulative",
            "LoRA trained on all data seen so far, at every task",
            family=UPPER_BOUND,
        ),
        "JointTraining": Method(
            _AVALANCHES + "JointTraining",
            "LoRA trained once on the data of all tasks together",
            family=UPPER_BOUND,
            joint=True,
        ),
    },
)
"""Methods by name; other packages add theirs by entry points ``treelora_avalanche.methods``."""


def check_models(methods: Iterable[str], settings: RunSettings) -> None:
    """Checks that methods are defined for the scenario's kind of model.

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


__all__ = ["BOTH", "LANGUAGE", "METHODS", "VISION", "Method", "Strength", "check_models"]
