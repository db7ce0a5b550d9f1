"""The methods of ``treelora list`` on real images and texts, importable by a new process."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from support import FEW_PROJECTIONS
from treelora_avalanche.registry.families import SharedArguments
from treelora_avalanche.registry.methods import METHODS
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs import Ingredients, prepare
from treelora_avalanche.runs.config import of_method
from treelora_avalanche.testing import Factories

CLASSES = ["airplanes", "Leopards", "Motorbikes", "accordion"]
TASKS = ["NumGLUE-cm", "FOMC"]
N_TEXTS = 8
RANK = 4
TREE = {"TreeLoRA", "TreeLoRA-last", "TreeLoRA-routed", "TreeLoRA-merged"}
PENALISED = {*TREE, "EWCLoRA", "OLoRA", "SAPT", "L2Anchor", "LwF"}


def image_settings(data_root: Path) -> RunSettings:
    return RunSettings(
        scenario="image_folder",
        data=str(data_root / "caltech101"),
        classes=CLASSES,
        n_experiences=2,
        model="deit_tiny_patch16_224",
        checkpoint=str(data_root / "deit_tiny_patch16_224_in1k" / "model.fp16.safetensors"),
        img_size=64,
        epochs=3,
        batch_size=10,
        layers="first:2",
        rank=RANK,
        device="cpu",
        method_options=FEW_PROJECTIONS,
    )


def text_settings(data_root: Path) -> RunSettings:
    return RunSettings(
        scenario="trace",
        data=str(data_root / "TRACE-Benchmark"),
        tasks=TASKS,
        limit=N_TEXTS,
        model=str(data_root / "stories260K"),
        max_length=96,
        epochs=3,
        lr=0.005,
        tree_lambda=0.5,
        rank=RANK,
        device="cpu",
    )


VISION, LANGUAGE = "vision", "language"
SETTINGS = {VISION: image_settings, LANGUAGE: text_settings}


def missing(kind: str, data_root: Path) -> str:
    """The data that a kind of model needs and that are missing, in words."""
    settings = SETTINGS[kind](data_root)
    paths = [settings.data, settings.checkpoint or settings.model]
    return ", ".join(str(path) for path in paths if not Path(str(path)).exists())


@dataclass
class Watch(SupervisedPlugin):
    """Measures, at every step, what a method's plugins add to the loss, and its largest gradient.

    It stands first among the plugins, and so sees the loss before them.
    """

    measures: bool = False
    penalties: list[list[tuple[float, float]]] = field(default_factory=list)
    loss: Any = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.penalties.append([])
        if self.measures:
            self._measure(strategy, self.penalties[-1])

    def _measure(self, strategy: Any, found: list[tuple[float, float]]) -> None:
        backward = type(strategy).backward

        def measured() -> None:
            penalty = strategy.loss - self.loss
            gradients = torch.autograd.grad(
                penalty, list(strategy.model.parameters()), retain_graph=True, allow_unused=True
            )
            largest = max((g.abs().max().item() for g in gradients if g is not None), default=0.0)
            found.append((penalty.item(), largest))
            backward(strategy)

        strategy.backward = measured

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.loss = strategy.loss.clone()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.loss = None
        vars(strategy).pop("backward", None)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@lru_cache
def ingredients(kind: str, data_root: Path) -> Ingredients:
    """The stream and the backbone that all methods of a kind share."""
    return prepare(0, SETTINGS[kind](data_root))


def backbone(kind: str, data_root: Path) -> Any:
    return copy.deepcopy(ingredients(kind, data_root).backbone)


def stream(kind: str, data_root: Path) -> Any:
    return ingredients(kind, data_root).benchmark


def build(kind: str, method: str, data_root: Path, model: Any) -> Any:
    """A strategy of the method, as the command line builds it."""
    entry = METHODS[method]
    if method == "InContext":
        model.max_length = 224  # room for a demonstration
    settings, options = of_method(method, SETTINGS[kind](data_root))
    shared = {
        "train_mb_size": settings.batch_size,
        "train_epochs": 1 if entry.frozen else settings.epochs,
        "eval_mb_size": 32,
        "device": torch.device("cpu"),
        "plugins": [Watch(method in PENALISED)],
        "evaluator": EvaluationPlugin(loggers=[]),
    }
    return entry.build(
        SharedArguments(model, settings, entry.lr(settings) or 0.0, 0, options, shared)
    )


def factories(kind: str, method: str, data_root: Path) -> Factories:
    """What builds a method, its model and its stream."""
    return Factories(
        partial(build, kind, method, data_root),
        partial(backbone, kind, data_root),
        partial(stream, kind, data_root),
    )


CASES = [
    (kind, name)
    for kind in SETTINGS
    for name, entry in METHODS.loadable()
    if kind in entry.models and not entry.joint
]
