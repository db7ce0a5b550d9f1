"""Builds the strategy of a method from the settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from treelora_avalanche.registry.settings import RunSettings

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate
    from torch import nn
    from torch.optim import Optimizer


Build = Callable[["nn.Module", RunSettings, float, int, dict[str, Any]], "SupervisedTemplate"]


TREE_OPTIONS = frozenset({"tree_lambda", "selection", "depth", "max_adapters"})


LORA_OPTIONS = frozenset({"rank", "alpha", "layers", "target_modules"})


REPLAY_SAMPLES = 200


def _lora_arguments(settings: RunSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in sorted(LORA_OPTIONS)}


def _head(settings: RunSettings) -> list[Any]:
    from treelora_avalanche.plugins import TaskAdaptiveHeadPlugin

    return [TaskAdaptiveHeadPlugin()] if settings.head == "task_adaptive" else []


def _optimizer(settings: RunSettings, lr: float) -> Callable[..., Optimizer]:
    from torch.optim import Adam, AdamW

    return partial(AdamW, lr=lr, weight_decay=0.0) if settings.on_language else partial(Adam, lr=lr)


def lora_method(name: str, **fixed: Any) -> Build:
    """Builder of a LoRA strategy of ours.

    :param name: the strategy's class.
    :param fixed: arguments that make the row of the table what it is.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        from treelora_avalanche import strategies

        # The head first, the same for all methods: it takes its statistics before anything else.
        plugins = [*_head(settings), *shared["plugins"]]
        strategy: SupervisedTemplate = getattr(strategies, name)(
            model=model,
            optimizer=_optimizer(settings, lr),
            accumulation_steps=settings.accumulation_steps,
            precision=settings.precision,
            **_lora_arguments(settings),
            **fixed,
            **{**shared, "plugins": plugins},
        )
        return strategy

    return build


def prompt_method(name: str) -> Build:
    """Builder of a strategy of ours with prompts, which takes either head.

    :param name: the strategy's class.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        from treelora_avalanche import strategies

        strategy: SupervisedTemplate = getattr(strategies, name)(
            model=model,
            optimizer=_optimizer(settings, lr),
            accumulation_steps=settings.accumulation_steps,
            precision=settings.precision,
            **{**shared, "plugins": [*_head(settings), *shared["plugins"]]},
        )
        return strategy

    return build


def hide_method(name: str, *options: str) -> Build:
    """Builder of a form of HiDe, which has a head of its own.

    :param name: the strategy's class.
    :param options: settings that are arguments of it.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        from treelora_avalanche import strategies

        own = {option: getattr(settings, option) for option in options}
        strategy: SupervisedTemplate = getattr(strategies, name)(
            model=model,
            optimizer=_optimizer(settings, lr),
            accumulation_steps=settings.accumulation_steps,
            precision=settings.precision,
            seed=seed,
            **own,
            **shared,
        )
        return strategy

    return build


def treelora(inference: str | None = None) -> Build:
    """Builder of TreeLoRA.

    :param inference: which adapter answers, see `TreeLoRAStrategy`.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        own = {name: getattr(settings, name) for name in sorted(TREE_OPTIONS)}
        builder = lora_method("TreeLoRAStrategy", inference=inference, seed=seed, **own)
        return builder(model, settings, lr, seed, shared)

    return build


def avalanche_method(name: str, *, lora: bool = True, joint: bool = False, **fixed: Any) -> Build:
    """Builder of a strategy of Avalanche, unchanged, trained with Adam.

    Language models are trained as by our strategies: with AdamW along a cosine.

    :param name: the strategy's class.
    :param lora: whether it trains LoRA, seen through its trainable parameters, or every weight.
    :param joint: whether it sees all tasks at once and so has no use for a head of ours.
    :param fixed: its own arguments.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        from avalanche import training

        from treelora_avalanche.adapters import TrainableView, add_lora
        from treelora_avalanche.models.views.precision import set_precision
        from treelora_avalanche.plugins import CosineSchedulePlugin, FiniteLossPlugin
        from treelora_avalanche.strategies.base.defaults import LANGUAGE, VISION

        if settings.accumulation_steps > 1:
            raise ValueError(
                f"`--accumulation_steps` is {settings.accumulation_steps}, and Avalanche's {name} "
                "makes a step of every batch; leave it out, and raise `--batch_size` as far as "
                "memory allows"
            )
        view = TrainableView(add_lora(model, **_lora_arguments(settings)) if lora else model)
        set_precision(view, settings.precision, shared["device"])
        # On its device now: an optimizer made of parameters that move later would train copies.
        view.to(shared["device"])
        head = [] if joint else _head(settings)
        plugins = [*head, *shared["plugins"], FiniteLossPlugin()]
        defaults = LANGUAGE if settings.on_language else VISION
        if defaults.numbers.schedule == "cosine":
            plugins.append(CosineSchedulePlugin())
        strategy: SupervisedTemplate = getattr(training, name)(
            model=view,
            optimizer=_optimizer(settings, lr)(view.parameters()),
            criterion=defaults.criterion(),
            **fixed,
            **{**shared, "plugins": plugins},
        )
        return strategy

    return build


def replay(
    model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
) -> SupervisedTemplate:
    from treelora_avalanche.plugins import MemoryDrawsPlugin

    builder = avalanche_method("Replay", mem_size=REPLAY_SAMPLES)
    plugins = [*shared["plugins"], MemoryDrawsPlugin()]
    return builder(model, settings, lr, seed, {**shared, "plugins": plugins})


def frozen_method(name: str) -> Build:
    """Builder of a strategy of ours that trains nothing.

    :param name: the strategy's class.
    """

    def build(
        model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
    ) -> SupervisedTemplate:
        from treelora_avalanche import strategies

        kept = {k: v for k, v in shared.items() if k not in ("train_mb_size", "train_epochs")}
        strategy: SupervisedTemplate = getattr(strategies, name)(model=model, **kept)
        return strategy

    return build


def in_context(
    model: nn.Module, settings: RunSettings, lr: float, seed: int, shared: dict[str, Any]
) -> SupervisedTemplate:
    return frozen_method("InContext")(model, settings, lr, seed, {**shared, "seed": seed})


def streaming_lda(
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
