"""Families of methods: what their strategies are built from, and their default learning rates.

Nothing heavy is imported until a strategy is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from treelora_avalanche.defaults import LANGUAGE_TRAINING, VISION_TRAINING
from treelora_avalanche.registry.settings import LORA_SETTINGS, TRAINING_SETTINGS, RunSettings

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate
    from torch import nn
    from torch.optim import Optimizer


class Rates(NamedTuple):
    """Default learning rates; None where methods have none.

    :param vision: for vision transformers (Adam).
    :param digits: for the digits, chosen by one rule: the best class-incremental accuracy on a
        quarter of the training digits held out (three seeds, four epochs, batches of 24, which
        keeps the number of steps). At the paper's rate, meant for large images and batches of 192,
        every method forgets nearly everything there. The rule was applied to plain LoRA, TreeLoRA
        and Naive; the other LoRA methods take plain LoRA's. None: that of ``vision``.
    :param language: for language models (AdamW).
    """

    vision: float | None = None
    digits: float | None = None
    language: float | None = None


@dataclass(frozen=True)
class SharedArguments:
    """Arguments that all strategies of a run share.

    :param model: a copy of the backbone, for this strategy alone.
    :param settings: of the method.
    :param lr: learning rate.
    :param seed: of the run.
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
        """Returns a constructor of the optimizer from parameters."""
        import torch

        defaults = LANGUAGE_TRAINING if self.settings.on_language else VISION_TRAINING
        kind = getattr(torch.optim, defaults.optimizer)
        return partial(kind, lr=self.lr, weight_decay=0.0)

    def lora(self, reads: frozenset[str]) -> dict[str, Any]:
        """Returns the LoRA settings.

        :param reads: settings that the method reads.
        """
        return {name: getattr(self.settings, name) for name in sorted(LORA_SETTINGS & reads)}

    def plugins(self, reads: frozenset[str]) -> list[Any]:
        """Returns the shared plugins, after the head where that is re-trained.

        The head comes first for all methods: it takes its statistics before anything else.

        :param reads: settings that the method reads.
        """
        from treelora_avalanche.plugins import TaskAdaptiveHeadPlugin

        adaptive = "head" in reads and self.settings.head == "task_adaptive"
        return [*([TaskAdaptiveHeadPlugin()] if adaptive else []), *self.shared["plugins"]]


Build = Callable[
    ["type[SupervisedTemplate]", SharedArguments, frozenset[str], dict[str, Any]],
    "SupervisedTemplate",
]
"""From a strategy's class, the shared arguments, the settings that the method reads and the
method's own options to the strategy."""


@dataclass(frozen=True)
class Family:
    """What methods of one kind have in common.

    :param build: builds a strategy.
    :param reads: settings with a meaning for these methods, of those that not all methods read.
    :param rates: default learning rates.
    :param kind: ``"ours"``; ``"Avalanche's"`` (run unchanged); ``"frozen"`` (the backbone is not
        trained); ``"upper bound"``; or what else :command:`treelora list` is to show.
    :param uses_lora: whether an adapter is trained, to be stored after every task.
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
    """Strategies that attach the adapter, or prompts, themselves: all of ours."""
    from treelora_avalanche.registry.options import parameters_of

    settings = given.settings
    own = {name: getattr(settings, name) for name in sorted(reads - TRAINING_SETTINGS)}
    arguments = {
        **given.shared,
        **own,
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
    """Strategies without an optimizer, and so without batches or epochs of training."""
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
    """Strategies that know no adapter, such as Avalanche's: they get a model with LoRA.

    The view shows the trainable parameters alone; without LoRA these are all weights. Language
    models are trained as by our strategies: with AdamW along a cosine.
    """
    from treelora_avalanche.adapters import TrainableView, add_lora
    from treelora_avalanche.models.views.precision import set_precision
    from treelora_avalanche.plugins import CosineSchedulePlugin, FiniteLossPlugin
    from treelora_avalanche.strategies.base.defaults import LANGUAGE, VISION

    settings, device = given.settings, given.shared["device"]
    if settings.accumulation_steps > 1:
        raise ValueError(
            f"`--accumulation_steps` is {settings.accumulation_steps}, but Avalanche's "
            f"{strategy.__name__} updates after every batch. Leave it out, and raise "
            "`--batch_size` as far as memory allows."
        )
    lora = given.lora(reads)
    view = TrainableView(add_lora(given.model, **lora) if lora else given.model)
    set_precision(view, settings.precision, device)
    # On its device now: an optimizer made of parameters that move later would train copies.
    view.to(device)
    plugins = [*given.plugins(reads), *options.pop("plugins", ()), FiniteLossPlugin()]
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
    """Avalanche's Replay, whose random draws are recorded so that it can be resumed."""
    from treelora_avalanche.plugins import MemoryDrawsPlugin

    return _build_on_view(strategy, given, reads, {**options, "plugins": [MemoryDrawsPlugin()]})


def _build_streaming_lda(
    strategy: type[SupervisedTemplate],
    given: SharedArguments,
    reads: frozenset[str],
    options: dict[str, Any],
) -> SupervisedTemplate:
    """Avalanche's StreamingLDA on the features of a timm model."""
    from torch.nn import CrossEntropyLoss

    model: Any = given.model
    n_classes = model.num_classes
    model.reset_classifier(0)  # timm's way to a model that returns its features
    # Frozen, as it is used: Avalanche trains nothing here, and would keep the graph all the same.
    model.requires_grad_(False)
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
:class:`~treelora_avalanche.strategies.SeqLoRA`, or with its arguments."""

PROMPTS = Family(
    _build_with_factory,
    TRAINING_SETTINGS,
    # On text TRACE has no value; on four of its tasks (48 samples, two epochs, stories260K) the
    # loss of the task just trained is lower than at a tenth of it (L2P) and at 0.005 (DualPrompt).
    Rates(vision=0.005, language=0.03),
    uses_lora=False,
)
"""Strategies that attach prompts to a frozen backbone; the rate is DualPrompt's and
HiDe-Prompt's."""

FROZEN = Family(_build_frozen, frozenset(), kind="frozen", uses_lora=False)
"""Strategies that train nothing by gradients and pass over the data of a task once."""

STREAMING_LDA = Family(_build_streaming_lda, frozenset(), kind="frozen", uses_lora=False)
"""Avalanche's StreamingLDA."""

AVALANCHE = Family(_build_on_view, rates=_LORA_RATES, kind="Avalanche's")
"""Avalanche's strategies, and others that know nothing of adapters: they get a model with LoRA, an
optimizer and a loss."""

REPLAY = Family(_build_replay, rates=_LORA_RATES, kind="Avalanche's")
"""Avalanche's Replay."""

EVERY_WEIGHT = Family(
    _build_on_view,
    TRAINING_SETTINGS,
    Rates(vision=0.0001, digits=0.00005, language=0.00001),  # language: TRACE's without LoRA
    kind="Avalanche's",
    uses_lora=False,
)
"""The same without LoRA."""

UPPER_BOUND = Family(
    _build_on_view,
    (TRAINING_SETTINGS | LORA_SETTINGS) - {"head"},
    _LORA_RATES,
    kind="upper bound",
)
"""Strategies that train on the data of all tasks together, and so without a head of ours."""
