"""Recognises the parts of one task in an online stream."""

from __future__ import annotations

from typing import Any

from treelora_avalanche.experiences import is_part, task_number


class TaskParts:
    """Tells whether an experience continues the task of the one before.

    ``split_online_stream`` cuts an experience into parts. A part continues the task if the part
    before was cut from the same experience. Any other experience is a task of its own::

        parts = TaskParts()
        parts.continues(experience)  # before training
        parts.finish(experience)  # after training

    """

    def __init__(self) -> None:
        self.task: int | None = None
        """Number of the task of the last part, -1 without a number; None after a whole task."""

    def continues(self, experience: Any) -> bool:
        """Returns whether the experience is a further part of the last trained task.

        :param experience: the experience that begins.
        """
        return (
            is_part(experience)
            and not experience.is_first_subexp
            and self.task == _number(experience)
        )

    def finish(self, experience: Any) -> None:
        """Records an experience that has been trained.

        :param experience: the experience that ends.
        """
        self.task = _number(experience) if is_part(experience) else None


def _number(experience: Any) -> int:
    number = task_number(experience)
    return -1 if number is None else number
