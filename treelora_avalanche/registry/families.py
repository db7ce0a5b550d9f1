"""Families of methods: how strategies are built, and their default learning rates.

torch is not imported until a strategy is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from treelora_avalanche.defaults import LANGUAGE_TRAINING, VISION_TRAINING
from treelora_avalanche.registry.settings import (
    LORA_SETTINGS,
    MERGE_SETTINGS,
    TRAINING_SETTINGS,
    RunSettings,
)

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate
    from torch import nn
    from torch.optim import Optimizer


class Rates(NamedTuple):
    """Default learning rates; None if there is none.

    >>> Rates(vision=0.005, language=1e-4)

    :param vision: rate for vision transformers (Adam).
    :param digits: rate for the digits; None: that of ``vision``. Chosen by the best
        class-incremental accuracy on a held-out quarter of the training digits (three seeds, four
        epochs, batches of 24, which keeps the number of steps) for SeqLoRA, TreeLoRA and Naive; the
        other LoRA methods use SeqLoRA's. At the paper's rate, meant for large images and batches
        of 192, every method forgets nearly everything on the digits.
    :param language: rate for language models (AdamW).
    """

    vision: float | None = None
    digits: float | None = None
    language: float | None = None


@dataclass(frozen=True)
class SharedArguments:
    """Arguments that are common to the strategies of a run.

    >>> arguments.optimizer()(model.parameters())  # Adam, AdamW for language models

    :param model: the strategy's own copy of the backbone.
    :param settings: settings of the method.
    :param lr: learning rate.
    :param seed: seed of the run.
    :param options: the method's own options.
    :param shared: ``train_mb_size``, ``train_epochs``, ``eval_mb_size``, ``device``, ``plugins``
        and ``evaluator``.
    """

    model: nn.Module
    settings: RunSettings
    lr: float
    seed: int
    options: dict[str, Any]
    shared: dict[str, Any]

    def optimizer(self) -> Callable[..., Optimizer]:
        """Returns a function from parameters to the optimizer."""
        import torch

        defaults = LANGUAGE_TRAINING if self.settings.on_language else VISION_TRAINING
        kind = getattr(torch.optim, defaults.optimizer)
        return partial(kind, lr=self.lr, weight_decay=0.0)

    def values(self, names: frozenset[str]) -> dict[str, Any]:
        """Returns settings by name; the default ``layers`` are left to the strategy.

        :param names: names of settings.
        """
        values = {name: getattr(self.settings, name) for name in sorted(names)}
        if "layers" in values and values["layers"] == self.settings.default_layers:
            values["layers"] = None  # all blocks of a model that has fewer
        return values

    def plugins(self, reads: frozenset[str]) -> list[Any]:
        """Returns the shared plugins, with the task-adaptive head first if it is used.

        The head collects its statistics before any other plugin changes the model.

        :param reads: settings that the method reads.
        """
        from treelora_avalanche.plugins import head_plugins

        head = self.settings.head if "head" in reads else "linear"
        return [*head_plugins(head), *self.shared["plugins"]]


Build = Callable[
    ["type[SupervisedTemplate]", SharedArguments, frozenset[str], dict[str, Any]],
    "SupervisedTemplate",
]
"""Function from a strategy class, the shared arguments, the settings that the method reads and its
own options to the strategy."""


@dataclass(frozen=True)
class Family:
    """Properties that methods of one kind share.

    >>> Method("my_package.strategies:MyLoRA", "LoRA with my penalty", family=LORA)

    :param build: builds a strategy.
    :param reads: settings that these methods read, of those that not all methods read.
    :param rates: default learning rates.
    :param kind: ``"ours"``; ``"Avalanche's"`` (unchanged); ``"frozen"`` (the backbone is not
        trained); ``"upper bound"``; or another word for :command:`treelora list` to show.
    :param uses_lora: whether an adapter is trained, and saved after every task.
    """

    build: Build
    reads: frozenset[str] = TRAINING_SETTINGS | LORA_SETTINGS
    rates: Rates = field(default_factory=Rates)
    kind: str = "ours"
    uses_lora: bool = True


def _build_with_factory(
    strategy: type[SupervisedTemplate],
    given: SharedArguments,
    reads: frozenset[str],
    options: dict[str, Any],
) -> SupervisedTemplate:
    """Builds a strategy that attaches its adapter or prompts itself."""
    from treelora_avalanche.registry.options import parameters_of

    settings = given.settings
    arguments = {
        **given.shared,
        **given.values(reads - TRAINING_SETTINGS),
        "plugins": given.plugins(reads),
        "optimizer": given.optimizer(),
        "accumulation_steps": settings.accumulation_steps,
        "precision": settings.precision,
        "seed": given.seed,
    }
    known = parameters_of(strategy)
    return strategy(
        model=given.model,
        **{name: value for name, value in arguments.items() if name in known},
        **options,
    )


def _build_frozen(
    strategy: type[SupervisedTemplate],
    given: SharedArguments,
    reads: frozenset[str],
    options: dict[str, Any],
) -> SupervisedTemplate:
    """Builds a strategy without an optimizer, and so without training batches or epochs."""
    from treelora_avalanche.registry.options import parameters_of

    training = ("train_mb_size", "train_epochs")
    shared = {name: value for name, value in given.shared.items() if name not in training}
    if "seed" in parameters_of(strategy):
        shared["seed"] = given.seed
    return strategy(model=given.model, **shared, **options)


def _build_on_view(
    strategy: type[SupervisedTemplate],
    given: SharedArguments,
    reads: frozenset[str],
    options: dict[str, Any],
) -> SupervisedTemplate:
    """Builds a strategy that does not attach adapters, such as Avalanche's, on a model with LoRA.

    A :class:`~treelora_avalanche.adapters.TrainableView` exposes only the trainable parameters:
    without LoRA, all weights. Language models are trained with AdamW and a cosine schedule, as by
    our strategies.
    """
    from treelora_avalanche.adapters import TrainableView, add_lora
    from treelora_avalanche.models.views.precision import set_precision
    from treelora_avalanche.plugins import (
        CosineSchedulePlugin,
        FiniteLossPlugin,
        MergedAdapterPlugin,
    )
    from treelora_avalanche.strategies.base.defaults import LANGUAGE, VISION

    settings, device = given.settings, given.shared["device"]
    if settings.accumulation_steps > 1:
        raise ValueError(
            "`--accumulation_steps` should be 1, since Avalanche's "
            f"{strategy.__name__} updates after every batch, but is "
            f"{settings.accumulation_steps}. Leave it out, and raise `--batch_size` instead."
        )
    lora = given.values(LORA_SETTINGS & reads)
    view = TrainableView(add_lora(given.model, **lora) if lora else given.model)
    set_precision(view, settings.precision, device)
    # Before the optimizer is made: parameters that move later are no longer the optimizer's.
    view.to(device)
    plugins = [*given.plugins(reads), *options.pop("plugins", ()), FiniteLossPlugin()]
    if settings.merge != "none" and reads >= MERGE_SETTINGS:
        plugins.insert(0, MergedAdapterPlugin(settings.merge))
    defaults = LANGUAGE if settings.on_language else VISION
    if defaults.numbers.schedule == "cosine":
        plugins.append(CosineSchedulePlugin())
    return strategy(
        model=view,
        optimizer=given.optimizer()(view.parameters()),
        criterion=defaults.criterion(),
        **options,
        **{**given.shared, "plugins": plugins},
    )


def _build_replay(
    strategy: type[SupervisedTemplate],
    given: SharedArguments,
    reads: frozenset[str],
    options: dict[str, Any],
) -> SupervisedTemplate:
    """Builds Avalanche's Replay, with its random draws recorded so that it can be resumed."""
    from treelora_avalanche.plugins import MemoryDrawsPlugin

    return _build_on_view(strategy, given, reads, {**options, "plugins": [MemoryDrawsPlugin()]})


def _build_streaming_lda(
    strategy: type[SupervisedTemplate],
    given: SharedArguments,
    reads: frozenset[str],
    options: dict[str, Any],
) -> SupervisedTemplate:
    """Builds Avalanche's StreamingLDA on the features of a timm model."""
    from torch.nn import CrossEntropyLoss

    from treelora_avalanche.models.views.precision import train_in_float32

    model: Any = given.model
    n_classes = model.num_classes
    model.reset_classifier(0)  # timm: the model returns its features
    # Avalanche trains nothing here, but would build the graph.
    model.requires_grad_(False)
    train_in_float32(model)
    arguments: dict[str, Any] = {
        "slda_model": model,
        "criterion": CrossEntropyLoss(),
        "input_size": model.num_features,
        "num_classes": n_classes,
    }
    return strategy(**arguments, **options, **given.shared)


_LORA_RATES = Rates(vision=VISION_TRAINING.lr, digits=0.0003, language=LANGUAGE_TRAINING.lr)

LORA = Family(_build_with_factory, rates=_LORA_RATES)
"""Strategies that attach LoRA themselves: subclasses of
:class:`~treelora_avalanche.strategies.SeqLoRA`, or with its signature."""

SUBSPACES = Family(
    _build_with_factory,
    TRAINING_SETTINGS | {"layers", "target_modules"},
    # peft's guide names 1e-5 to 1e-4. Of images 1e-4 learns too little: in three epochs on four
    # classes of Caltech-101 (DeiT-Tiny, 64 px) one class of two. Of digits, the best of five on the
    # held-out ones (two seeds). Not tuned otherwise.
    Rates(vision=0.0005, digits=0.0002, language=0.0001),
    uses_lora=False,
)
"""OSF, which trains the weights that LoRA adapts, within subspaces."""

PROMPTS = Family(
    _build_with_factory,
    TRAINING_SETTINGS,
    # TRACE gives no rate for text. On four of its tasks (48 samples, two epochs, stories260K),
    # 0.03 has a lower loss on the present task than a tenth of it (L2P) and 0.005 (DualPrompt).
    Rates(vision=0.005, language=0.03),
    uses_lora=False,
)
"""Strategies that attach prompts to a frozen backbone, with the learning rate of DualPrompt and
HiDe-Prompt."""

FROZEN = Family(_build_frozen, frozenset(), kind="frozen", uses_lora=False)
"""Strategies that train nothing by gradients, in one pass over the data of a task."""

WHOLE_MODEL = Family(
    _build_with_factory, TRAINING_SETTINGS, Rates(vision=VISION_TRAINING.lr), uses_lora=False
)
"""Strategies of this library that train every weight."""

STREAMING_LDA = Family(_build_streaming_lda, frozenset(), kind="frozen", uses_lora=False)
"""Avalanche's StreamingLDA."""

AVALANCHE = Family(_build_on_view, rates=_LORA_RATES, kind="Avalanche's")
"""Avalanche's strategies, and others that take a model, an optimizer and a loss; the model has
LoRA."""

REPLAY = Family(_build_replay, rates=_LORA_RATES, kind="Avalanche's")
"""Avalanche's Replay."""

EVERY_WEIGHT = Family(
    _build_on_view,
    TRAINING_SETTINGS,
    Rates(vision=0.0001, digits=0.00005, language=0.00001),  # language: TRACE's full fine-tuning
    kind="Avalanche's",
    uses_lora=False,
)
"""The same without LoRA: full fine-tuning."""

UPPER_BOUND = Family(
    _build_on_view,
    (TRAINING_SETTINGS | LORA_SETTINGS) - {"head"},
    _LORA_RATES,
    kind="upper bound",
)
"""Strategies that train on the data of all tasks together, and so need no task-adaptive head."""
