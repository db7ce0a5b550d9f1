"""Draws the demonstrations of in-context learning from the texts of every experience."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from statistics import median_high
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.models.views.in_context_language import (
    Demonstrations,
    InContextLanguageModel,
    answer_form,
)
from treelora_avalanche.state import check_keys, check_same_settings

logger = logging.getLogger(__name__)


class DemonstrationsPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Gives the model some training texts of every experience as demonstrations.

    They are balanced over a task's answers, and such that all fit before a prompt of the task's
    median length into the model's ``max_length``; a warning says where fewer than
    ``n_demonstrations`` do. Stores per task up to ``n_demonstrations`` pairs of prompt and
    reference answer, and one vector of the model's embedding size. Task labels are not used.
    Example::

        model = InContextLanguageModel(language_model)
        strategy = Naive(model, plugins=[DemonstrationsPlugin(model)])

    :param model: the model that prepends the demonstrations.
    :param n_demonstrations: number per task; all where it has fewer.
    :param seed: seed of the draw.
    :raises ValueError: if ``n_demonstrations`` is below 1. The first ``train`` raises one if no
        demonstration fits in any task of the stream.
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

    @property
    def stored_texts(self) -> list[str]:
        """All prompts and answers that are kept."""
        return [text for task in self.model.tasks for text in (*task.prompts, *task.answers)]

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Checks that the experience has texts."""
        experience = strategy.experience
        if not getattr(experience, "prompts", None) or not getattr(experience, "answers", None):
            raise ValueError(
                f"experience {experience.current_experience} should have texts in `prompts` and "
                "`answers`, from which InContext draws demonstrations, but has none. Set these "
                "attributes, as `treelora_avalanche.scenarios.TRACE` does."
            )
        if not self.model.tasks:
            self._check_room(experience)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Draws the demonstrations of the experience."""
        experience = strategy.experience
        prompts, answers = experience.prompts, experience.answers
        drawn = self._draw(experience)
        wanted = min(self.n_demonstrations, len(prompts))
        if len(drawn) < wanted:
            logger.warning(
                "%s: %d of %d demonstrations fit before a prompt of median length into %d tokens; "
                "raise max_length for more, if the model allows it",
                getattr(experience, "task_name", f"experience {experience.current_experience}"),
                len(drawn),
                wanted,
                self._room(experience),
            )
        self.model.tasks.append(
            Demonstrations(
                [prompts[i] for i in drawn],
                [answers[i] for i in drawn],
                self.model.embeddings(prompts).mean(0),
                answer_form(answers),
            )
        )

    def _draw(self, experience: Any) -> list[int]:
        """Returns the samples to demonstrate: those first in a balanced random order that fit."""
        prompts, answers = experience.prompts, experience.answers
        generator = torch.Generator().manual_seed(self.seed + len(self.model.tasks))
        order = torch.randperm(len(prompts), generator=generator).tolist()
        room = self._room(experience) - self._prompt_length(prompts)
        drawn: list[int] = []
        for i in balanced(order, answers):
            if room <= 0 or len(drawn) == self.n_demonstrations:
                break
            n_tokens = self._length(prompts[i], answers[i])
            if n_tokens <= room:
                drawn.append(i)
                room -= n_tokens
        return drawn

    def _room(self, experience: Any) -> int:
        """Returns the number of tokens for demonstrations and prompt."""
        return self.model.module.prompt_room(getattr(experience, "max_new_tokens", 1))

    def _prompt_length(self, prompts: Sequence[str]) -> int:
        return median_high(map(self.model.n_tokens, prompts))

    def _length(self, prompt: str, answer: str) -> int:
        """Returns the tokens of a demonstration and of the empty line after it."""
        shown = Demonstrations([prompt], [answer], torch.empty(0)).before("")
        return self.model.n_tokens(shown) - self.model.n_tokens("")

    def _check_room(self, first: Any) -> None:
        """Raises an error if no task of the stream has room for a demonstration."""
        stream = [e for e in getattr(first, "origin_stream", ()) if getattr(e, "prompts", None)]
        if any(map(self._draw, stream or [first])):
            return
        room = self._room(first)
        shortest = min(map(self._length, first.prompts, first.answers))
        least = self._prompt_length(first.prompts) + shortest
        raise ValueError(
            f"`max_length` should hold a demonstration and a prompt, {least} tokens in experience "
            f"{first.current_experience}, but leaves {room}, and no task of the stream has room "
            f"for one. Raise it by at least {least - room}, or take a model of longer context."
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
                list(task["prompts"]),
                list(task["answers"]),
                task["embedding"].detach().cpu(),
                task["form"],
            )
            for task in state["tasks"]
        ]


def balanced(order: Sequence[int], answers: Sequence[str]) -> list[int]:
    """Returns samples in an order in which equal answers come as late as possible.

    The first of each answer come first, then the second of each; among these the order stays.

    >>> balanced([3, 2, 0, 1], ["A", "B", "A", "A"])
    [3, 1, 2, 0]

    :param order: samples in a random order.
    :param answers: answer of each sample.
    """
    seen: Counter[str] = Counter()
    rank = {}
    for i in order:
        rank[i] = seen[answers[i]]
        seen[answers[i]] += 1
    return sorted(order, key=rank.__getitem__)
