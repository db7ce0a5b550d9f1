"""Draws the demonstrations of in-context learning from the texts of every experience."""

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
    """Gives the model some training texts of every experience as demonstrations.

    Stores per task ``n_demonstrations`` pairs of prompt and reference answer, and one vector of the
    model's embedding size. Task labels are not used. Example::

        model = InContextLanguageModel(language_model)
        strategy = Naive(model, plugins=[DemonstrationsPlugin(model)])

    :param model: the model that prepends the demonstrations.
    :param n_demonstrations: number per task; all where it has fewer.
    :param seed: seed of the draw.
    :raises ValueError: if ``n_demonstrations`` is below 1.
    """

    def __init__(self, model: InContextLanguageModel, n_demonstrations: int = 6, seed: int = 0):
        super().__init__()
        if n_demonstrations < 1:
            raise ValueError(
                f"`n_demonstrations` should be at least 1, but is {n_demonstrations}. Pass the "
                "number of examples per task."
            )
        self.model = model
        self.n_demonstrations = n_demonstrations
        self.seed = seed

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Checks that the experience has texts."""
        experience = strategy.experience
        if not getattr(experience, "prompts", None) or not getattr(experience, "answers", None):
            raise ValueError(
                f"experience {experience.current_experience} should have texts in `prompts` and "
                "`answers`, from which InContext draws demonstrations, but has none. Set these "
                "attributes, as `treelora_avalanche.scenarios.TRACE` does."
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
        """Returns the demonstrations of every task, and the arguments."""
        return {
            "n_demonstrations": self.n_demonstrations,
            "seed": self.seed,
            "tasks": [task._asdict() for task in self.model.tasks],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads demonstrations into the model; the arguments must be the same.

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
