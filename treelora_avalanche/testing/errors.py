"""The error of a strategy that violates the contract."""

from __future__ import annotations


class ContractError(AssertionError):
    """A strategy that violates the contract.

    >>> raise ContractError("frozen weights", "3 frozen tensors changed.", "Freeze them.")
    Traceback (most recent call last):
    ContractError: [frozen weights] 3 frozen tensors changed. Freeze them.

    :param check: name of the check.
    :param observation: what was observed.
    :param remedy: what to do.
    """

    def __init__(self, check: str, observation: str, remedy: str):
        super().__init__(check, observation, remedy)  # the arguments, so that it can be pickled
        self.check = check
        self.observation = observation
        self.remedy = remedy

    def __str__(self) -> str:
        return f"[{self.check}] {self.observation} {self.remedy}"


NO_TASK_LABELS = "no task labels"
INFER_THE_TASK = "Infer the task from the input: task labels are unknown at test time."
