"""The methods that the command line knows, as an explicit table.

Nothing heavy is imported until a method is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treelora_avalanche.choices import check_known
from treelora_avalanche.registry.builders import (
    LORA_OPTIONS,
    REPLAY_SAMPLES,
    TREE_OPTIONS,
    Build,
    avalanche_method,
    frozen_method,
    hide_method,
    in_context,
    lora_method,
    prompt_method,
    replay,
    streaming_lda,
    treelora,
)
from treelora_avalanche.registry.settings import SCENARIOS, RunSettings

if TYPE_CHECKING:
    pass


TRAINING_OPTIONS = frozenset({"head", "epochs", "lr", "precision"})


VISION, LANGUAGE = "vision", "language"
BOTH = frozenset({VISION, LANGUAGE})

LORA_LR = 0.005
""" The paper's, for LoRA. """
LORA_DIGITS_LR = 0.0003
PROMPT_LR = 0.005
""" DualPrompt's and HiDe-Prompt's. """
L2P_LR = 0.03
""" L2P's. """
LORA_LANGUAGE_LR = 0.0001
""" As in TRACE, for methods with LoRA; the paper gives this value and 0.001 (A.3). """
PROMPT_LANGUAGE_LR = 0.03
""" Of methods with prompts on text. TRACE has no value for them; on four of its tasks (48 samples,
two epochs, stories260K) the loss of the task just trained is lower than at a tenth of it (L2P) and
at 0.005 (DualPrompt). """


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
    language_lr: float | None = None
    """ The same for language models (AdamW). """
    models: frozenset[str] = frozenset({VISION})
    """ Kinds of models that it is defined for: vision, language. """
    kind: str = "ours"
    """ ours; Avalanche's (run unchanged); frozen (the backbone is not trained); upper bound. """
    ignores: frozenset[str] = frozenset()
    """ Settings without a meaning for this method. """
    uses_lora: bool = True
    """ Whether an adapter is trained, to be stored after every task. """
    joint: bool = False
    """ Whether it trains once, on all tasks together. """

    @property
    def on_all_seen(self) -> bool:
        """Whether it trains on the data of past tasks as much as on that of the present one."""
        return self.kind == "upper bound"

    @property
    def has_tree(self) -> bool:
        """Whether it is a form of TreeLoRA."""
        return self.ignores.isdisjoint(TREE_OPTIONS)

    @property
    def frozen(self) -> bool:
        """Whether it passes over the data of a task once and trains nothing by gradients."""
        return self.kind == "frozen"

    def epochs(self, settings: RunSettings) -> int:
        """Passes over the data of a task, where the settings have one number for all tasks.

        :param settings: the settings.
        """
        return 1 if self.frozen else settings.epochs or 1


# --------------------------------------------------------------------------------------------------
# Builders


# --------------------------------------------------------------------------------------------------
# The table


METHODS: dict[str, Method] = {
    "TreeLoRA": Method(
        "LoRA pulled towards the adapter of the most similar past task, found in a tree",
        treelora(),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
    ),
    "TreeLoRA-last": Method(
        "TreeLoRA answered by the adapter of the last task, as in the paper",
        treelora("last"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
    ),
    "TreeLoRA-routed": Method(
        "TreeLoRA whose samples are answered each by the adapter it seems to belong to",
        treelora("routed"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
    ),
    "SeqLoRA": Method(
        "plain LoRA, one adapter trained from task to task",
        lora_method("SeqLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS,
    ),
    "EWCLoRA": Method(
        "LoRA with elastic weight consolidation (online, λ = 50)",
        lora_method("EWCLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS,
    ),
    "GEMLoRA": Method(
        "LoRA with gradient episodic memory (100 stored samples per task)",
        lora_method("GEMLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS,
    ),
    "OGD": Method(
        "LoRA with gradients projected off those of past samples (200 per task, at most 1,000)",
        lora_method("OGD"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS,
    ),
    "OLoRA": Method(
        "one LoRA per task, all in use, each orthogonal to those before (λ1 = 0.5)",
        lora_method("OLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS,
    ),
    "InfLoRA": Method(
        "one LoRA per task, all in use, each fixed to where past inputs have no part (ε = 0.95)",
        lora_method("InfLoRA"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS,
    ),
    "L2P": Method(
        "prompts from one pool before the tokens, each sample's by the nearest keys (30, top 5)",
        prompt_method("L2P"),
        lr=L2P_LR,
        language_lr=PROMPT_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS | LORA_OPTIONS,
        uses_lora=False,
    ),
    "DualPrompt": Method(
        "general prompts for all tasks and an expert prompt per task, chosen by the nearest key",
        prompt_method("DualPrompt"),
        lr=PROMPT_LR,
        language_lr=PROMPT_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS | LORA_OPTIONS,
        uses_lora=False,
    ),
    "HiDePrompt": Method(
        "a prompt per task, chosen by the class the frozen backbone sees; head on centroids",
        hide_method("HiDePrompt"),
        lr=PROMPT_LR,
        ignores=TREE_OPTIONS | LORA_OPTIONS | {"head"},
        uses_lora=False,
    ),
    "HiDeLoRA": Method(
        "a LoRA per task (keys, values), chosen by what the frozen backbone sees",
        hide_method("HiDeLoRA", "rank", "alpha", "layers"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS | {"head", "target_modules"},
    ),
    "SAPT": Method(
        "one LoRA per task, all in use, weighed by an attention of the prompt over the tasks",
        lora_method("SAPT"),
        lr=None,
        language_lr=LORA_LANGUAGE_LR,
        models=frozenset({LANGUAGE}),
        ignores=TREE_OPTIONS,
    ),
    "TaSL": Method(
        "LoRA whose matrices are mixed after a task with those before, by their importance",
        lora_method("TaSL"),
        lr=None,
        language_lr=LORA_LANGUAGE_LR,
        models=frozenset({LANGUAGE}),
        ignores=TREE_OPTIONS,
    ),
    "L2Anchor": Method(
        "LoRA pulled, in squared L2, towards the adapter of the task before: a control",
        lora_method("L2Anchor"),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        ignores=TREE_OPTIONS,
    ),
    "Naive": Method(
        "fine-tuning of every weight, without LoRA",
        avalanche_method("Naive", lora=False),
        lr=0.0001,
        digits_lr=0.00005,
        language_lr=0.00001,  # as in TRACE, for methods without LoRA
        models=BOTH,
        kind="Avalanche's",
        ignores=TREE_OPTIONS | LORA_OPTIONS,
        uses_lora=False,
    ),
    "LwF": Method(
        "LoRA with learning without forgetting (α = 1, temperature 2)",
        avalanche_method("LwF", alpha=1.0, temperature=2.0),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        kind="Avalanche's",
        ignores=TREE_OPTIONS,
    ),
    "Replay": Method(
        f"LoRA with {REPLAY_SAMPLES} stored samples, mixed into every batch",
        replay,
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        kind="Avalanche's",
        ignores=TREE_OPTIONS,
    ),
    "FrozenNCM": Method(
        "nearest class mean on the features of the untrained backbone",
        frozen_method("FrozenNCM"),
        lr=None,
        kind="frozen",
        ignores=TREE_OPTIONS | LORA_OPTIONS | TRAINING_OPTIONS,
        uses_lora=False,
    ),
    "FrozenGaussian": Method(
        "the task-adaptive head on the features of the untrained backbone",
        frozen_method("FrozenGaussian"),
        lr=None,
        kind="frozen",
        ignores=TREE_OPTIONS | LORA_OPTIONS | TRAINING_OPTIONS,
        uses_lora=False,
    ),
    "InContext": Method(
        "six demonstrations of the nearest task in the prompt of the untrained model (FIX)",
        in_context,
        lr=None,
        models=frozenset({LANGUAGE}),
        kind="frozen",
        ignores=TREE_OPTIONS | LORA_OPTIONS | TRAINING_OPTIONS,
        uses_lora=False,
    ),
    "StreamingLDA": Method(
        "Avalanche's streaming discriminant analysis on the untrained backbone",
        streaming_lda,
        lr=None,
        kind="frozen",
        ignores=TREE_OPTIONS | LORA_OPTIONS | TRAINING_OPTIONS,
        uses_lora=False,
    ),
    "Cumulative": Method(
        "LoRA trained on all data seen so far, again after every task",
        avalanche_method("Cumulative", joint=True),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
        kind="upper bound",
        ignores=TREE_OPTIONS | {"head"},
    ),
    "JointTraining": Method(
        "LoRA trained once, on the data of all tasks together",
        avalanche_method("JointTraining", joint=True),
        lr=LORA_LR,
        digits_lr=LORA_DIGITS_LR,
        language_lr=LORA_LANGUAGE_LR,
        models=BOTH,
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


def check_models(methods: Iterable[str], settings: RunSettings) -> None:
    """Raise an error if the scenario's kind of model is not one that a method is defined for.

    :param methods: names of the methods.
    :param settings: the settings.
    """
    kind = LANGUAGE if SCENARIOS[settings.scenario].language else VISION
    for name in methods:
        if kind not in find_method(name).models:
            possible = ", ".join(known for known, entry in METHODS.items() if kind in entry.models)
            raise ValueError(
                f"`--scenario {settings.scenario}` is for {kind} models, and {name} is not defined "
                f"for them; possible: {possible}"
            )


__all__ = ["METHODS", "Method", "check_models", "find_method"]
