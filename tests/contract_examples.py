"""Strategies that hold the contract or violate one part of it, importable by a new process."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from avalanche.training import Replay
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.plugins import MemoryDrawsPlugin
from treelora_avalanche.strategies import FrozenNCM, SeqLoRA

OPTIONS: dict[str, Any] = {"train_mb_size": 8, "train_epochs": 1, "evaluator": None}


class Plain(SupervisedPlugin):
    """A plugin that keeps nothing."""

    def __init__(self) -> None:
        super().__init__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def plain(model: nn.Module) -> SeqLoRA:
    return SeqLoRA(model, **OPTIONS)


def with_plugin(plugin: type[SupervisedPlugin], model: nn.Module) -> SeqLoRA:
    return SeqLoRA(model, plugins=[plugin()], **OPTIONS)


def frozen(model: nn.Module) -> FrozenNCM:
    return FrozenNCM(model, evaluator=None)


class WritesToFrozenWeights(Plain):
    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        weight = strategy.model.module.get_base_model().patch_embed.proj.weight
        with torch.no_grad():
            weight += 1e-3


class TakesBackEveryStep(Plain):
    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.start = [p.detach().clone() for p in strategy.model.parameters()]

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for parameter, start in zip(strategy.model.parameters(), self.start, strict=True):
                parameter.copy_(start)


class MajorityOfTheBatch(SeqLoRA):
    """Adds the mean logits of the mini-batch to every prediction."""

    def forward(self) -> Tensor:
        logits = super().forward()
        return logits + logits.mean(0)


class ReadsTheTaskLabel(SeqLoRA):
    def forward(self) -> Tensor:
        return super().forward() + self.mb_task_id[:, None]


class ReadsTheExperience(SeqLoRA):
    """Predicts only the classes of the experience that is evaluated."""

    def forward(self) -> Tensor:
        logits = super().forward()
        if self.is_training:
            return logits
        classes = self.experience.classes_in_this_experience
        return logits.index_fill(1, torch.tensor(classes), 100.0)


class ChoosesByExperience(SeqLoRA):
    """Scales its logits by the number of the experience that was evaluated last."""

    scale = 1.0

    def _before_eval_exp(self, **kwargs: Any) -> None:
        super()._before_eval_exp(**kwargs)
        self.scale = 1.0 + self.experience.current_experience

    def forward(self) -> Tensor:
        return super().forward() * self.scale


def of_class(strategy_class: type[SeqLoRA], model: nn.Module) -> SeqLoRA:
    return strategy_class(model, **OPTIONS)


class ReadsTheFuture(Plain):
    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        stream = strategy.experience.origin_stream
        stream[len(stream) - 1].dataset[0]


class ReadsThePast(Plain):
    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        strategy.experience.origin_stream[0].dataset[0]


class ReadsTheTestStream(Plain):
    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        strategy.experience.origin_stream.benchmark.test_stream[0].dataset[0]


def replay(model: nn.Module) -> Replay:
    optimizer = torch.optim.Adam(model.parameters())
    plugins = [MemoryDrawsPlugin()]
    return Replay(
        model=model,
        optimizer=optimizer,
        mem_size=12,
        plugins=plugins,
        criterion=nn.CrossEntropyLoss(),
        **OPTIONS,
    )


class KeepsAVectorPerTask(Plain):
    """Stores 100 numbers per task."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors: list[Tensor] = []

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.vectors.append(torch.zeros(100))

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": self.vectors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vectors = state["vectors"]


class ForgetsToSave(Plain):
    """Changes predictions by an attribute of the model that no state holds."""

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        classifier_of(strategy.model).register_forward_hook(lambda module, x, y: y + 1)


class HasNoState(SupervisedPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.n_tasks = 0

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.n_tasks += 1


def differs_in_a_new_process(home: int, model: nn.Module) -> SeqLoRA:
    """A factory that adapts fewer layers in any process but the one it was made for."""
    layers = [0, 1] if os.getpid() == home else [0]
    return SeqLoRA(model, layers=layers, **OPTIONS)


def elsewhere_different() -> Any:
    return partial(differs_in_a_new_process, os.getpid())
