"""Picks the demonstrations of in-context learning from the texts of every experience."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.models.views.in_context_language import (
    Demonstrations,
    InContextLanguageModel,
)
from treelora_avalanche.state import check_keys, check_same_settings


class DemonstrationsPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Gives the model some training texts of every experience as its demonstrations.

    Stores per task ``n_demonstrations`` pairs of prompt and answer, and one vector as wide as the
    model's embeddings. Task labels are not used.

    :param model: the model that shows them.
    :param n_demonstrations: how many of a task; all where it has fewer.
    :param seed: of the drawing.
    :raises ValueError: if ``n_demonstrations`` is below 1.
    """

    def __init__(self, model: InContextLanguageModel, n_demonstrations: int = 6, seed: int = 0):
        super().__init__()
        if n_demonstrations < 1:
            raise ValueError(f"`n_demonstrations` must be at least 1, and is {n_demonstrations}.")
        self.model = model
        self.n_demonstrations = n_demonstrations
        self.seed = seed

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Makes sure that there are texts."""
        experience = strategy.experience
        if not getattr(experience, "prompts", None) or not getattr(experience, "answers", None):
            raise ValueError(
                f"experience {experience.current_experience} has no texts in `prompts` and "
                "`answers`, of which InContext takes its demonstrations; set these attributes on "
                "it, as `treelora_avalanche.scenarios.TRACE` does."
            )

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Draws the demonstrations of the experience."""
        prompts, answers = strategy.experience.prompts, strategy.experience.answers
        generator = torch.Generator().manual_seed(self.seed + len(self.model.tasks))
        drawn = torch.randperm(len(prompts), generator=generator)[: self.n_demonstrations].tolist()
        self.model.tasks.append(
            Demonstrations(
                [prompts[i] for i in drawn],
                [answers[i] for i in drawn],
                self.model.embeddings(prompts).mean(0),
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """The demonstrations of every task, and how they are drawn."""
        return {
            "n_demonstrations": self.n_demonstrations,
            "seed": self.seed,
            "tasks": [task._asdict() for task in self.model.tasks],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Gives the model the demonstrations of a state; they must be drawn in the same way.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; nothing has changed then.
        """
        check_keys(state, self.state_dict(), "the state of DemonstrationsPlugin")
        check_same_settings(state, {"n_demonstrations": self.n_demonstrations, "seed": self.seed})
        for task in state["tasks"]:
            check_keys(task, Demonstrations._fields, "the demonstrations of a task")
        self.model.tasks = [
            Demonstrations(
                list(task["prompts"]), list(task["answers"]), task["embedding"].detach().cpu()
            )
            for task in state["tasks"]
        ]
