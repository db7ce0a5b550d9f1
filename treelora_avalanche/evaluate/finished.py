"""Loads the base model and the final model of a finished language run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treelora_avalanche.checkpoint import load_prediction_state
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs.config import find_device
from treelora_avalanche.runs.folder import MODEL
from treelora_avalanche.runs.setup import Ingredients, build_strategy, language_model
from treelora_avalanche.state import load_state

Forward = Callable[[Tensor, Tensor], Tensor]
"""Function from tokens ``(batch, length)`` and targets, -100 outside of the answer, to logits
``(batch, vocabulary, columns)``; of their last columns at least."""


@dataclass(frozen=True)
class Predictor:
    """A language model with the forward pass by which its strategy predicts.

    >>> Predictor.of_base(model).forward(tokens, targets)

    :param model: the model; a view of it routes texts in evaluation mode.
    :param forward: the forward pass, which tells prompt and answer apart by the targets.
    """

    model: nn.Module
    forward: Forward

    @classmethod
    def of_base(cls, model: nn.Module) -> Predictor:
        """Returns the predictor of a language model without adapters.

        :param model: the language model.
        """
        return cls(model, lambda tokens, targets: model(tokens, last=targets.shape[1]))

    @classmethod
    def of_strategy(cls, strategy: Any) -> Predictor:
        """Returns the predictor of a strategy, whose ``forward`` routes by the prompts alone.

        :param strategy: an Avalanche strategy of a language model.
        """

        def forward(tokens: Tensor, targets: Tensor) -> Tensor:
            strategy.mbatch = [tokens, targets, torch.zeros_like(tokens[:, 0])]
            logits: Tensor = strategy.forward()
            return logits

        return cls(strategy.model, forward)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of a language model.

    >>> run = FinishedRun.read("runs/train/TreeLoRA-seed0-1a2b3c4d")
    >>> base = run.base_model()
    >>> final = Predictor.of_strategy(run.strategy(base))

    :param folder: the run folder.
    :param config: configuration of the run.
    """

    folder: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> FinishedRun:
        """Reads the configuration of a run.

        :param folder: the run folder.
        :raises ValueError: see :func:`~treelora_avalanche.evaluate.command.check_run`.
        """
        folder = Path(folder)
        config = json.loads((folder / "results.json").read_text(encoding="utf-8"))["config"]
        return cls(folder, config)

    @property
    def settings(self) -> RunSettings:
        """The settings of the run; the device is one of this machine."""
        names = {field.name for field in fields(RunSettings)}
        values = {name: value for name, value in self.config.items() if name in names}
        return RunSettings(**{**values, "device": "auto"})

    @property
    def device(self) -> torch.device:
        """Device of the evaluation: a GPU if there is one."""
        return find_device("auto")

    def base_model(self) -> Any:
        """Returns the pretrained language model, on the CPU."""
        return language_model(self.settings, self.config["dtype"])

    def strategy(self, base: nn.Module) -> Any:
        """Returns the strategy after the stream, on a copy of the base model.

        :param base: from :meth:`base_model`.
        :raises ValueError: if its weights are not those that the run started from.
        """
        strategy = build_strategy(
            self.config["method"],
            self.settings,
            Ingredients(self.config["seed"], None, base),
            device=self.device,
            plugins=[],
            evaluator=None,
        )
        load_prediction_state(strategy, load_state(self.folder / MODEL))
        return strategy


__all__ = ["FinishedRun", "Forward", "Predictor"]
