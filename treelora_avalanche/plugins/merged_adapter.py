"""Sets the active adapter, after every experience, to all finished ones merged into one."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from peft.utils.merge_utils import ties
from torch import Tensor

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.choices import MERGES, check_known
from treelora_avalanche.experiences import is_part
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, check_same_settings, clone_state

TIES_DENSITY = 0.2
"""Share of a task vector's values that TIES keeps, the paper's."""


def largest(vectors: Tensor) -> Tensor:
    """Returns the value of largest magnitude of every coordinate, with its sign.

    The merging of MagMax (Marczak et al., ECCV 2024, arXiv 2407.06322), which peft does not have.

    >>> largest(torch.tensor([[1.0, -2.0], [-3.0, 0.5]]))
    tensor([-3., -2.])

    :param vectors: ``(n_vectors, n_values)``.
    """
    return vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).squeeze(0)


class MergedAdapterPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Predicts with all adapters learned so far, merged into one.

    With θ_i the adapter at the end of experience i, θ_0 the one before the first and the task
    vectors τ_i = θ_i − θ_0, the active adapter after experience n is

    - ``"mean"``: ``(θ_1 + ... + θ_n) / n``. In TreeLoRA's Figure 2 the inner nodes of the tree are
      the adapters of groups of tasks; the root's is that of all. The mean is a running one; time
      and memory do not grow with the experiences.
    - ``"ties"``: ``θ_0 + TIES(τ_1, ..., τ_n)`` (Yadav et al., NeurIPS 2023, arXiv 2306.01708), by
      peft: of every τ_i the fifth of largest magnitude is kept, and of these every coordinate
      averages the values of the sign that weighs more. Stores one adapter per task.
    - ``"magmax"``: ``θ_0 + τ``, with the τ_i of largest magnitude in every coordinate
      (:func:`largest`). Stores four adapters, whatever the number of tasks.

    The next experience starts from the merged adapter, so no θ_i is far from the others and the
    factors themselves can be merged; with ``"magmax"`` it starts from the last experience's own
    θ_n, as in its paper. In an online stream the parts of a task are one task: a further part
    continues from the adapter of the part before, and replaces it in the merge.

    Works with any strategy whose model carries LoRA. The classifier must fit the merged adapter,
    not the one it was trained with: place this plugin before a
    :class:`~treelora_avalanche.plugins.TaskAdaptiveHeadPlugin`, and after a
    :class:`~treelora_avalanche.plugins.TreeBuilderPlugin`, which stores the experience's own
    adapter. Task labels are not used. Example::

        plugins = [TreeBuilderPlugin(tree, bank), MergedAdapterPlugin(), TaskAdaptiveHeadPlugin()]

    :param merge: ``"mean"``, ``"ties"`` or ``"magmax"``.
    :raises ValueError: if ``merge`` is unknown.
    """

    requires_whole_adapter: str | None = None
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(self, merge: str = "mean") -> None:
        super().__init__()
        check_known("`merge`", merge, [kind for kind in MERGES if kind != "none"])
        self.merge = merge
        if merge != "mean":
            self.requires_whole_adapter = "merges the differences of adapters from the first one"
        self.n_experiences = 0
        """Number of tasks in the merged adapter."""
        self._parts = TaskParts()
        self._continues = False
        self._mean: Tensor | None = None
        """The merged adapter before the task."""
        self._own: Tensor | None = None
        """The adapter of the task, where training continues: after a part of a task, and always
        with ``"magmax"``."""
        self._start: Tensor | None = None
        """The adapter before the first task, unless the mean is taken."""
        self._vectors: Tensor | None = None
        """Task vectors of past tasks and, last, of the present one, ``(n_vectors, n_values)``."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the merged adapter so far, where training starts."""
        self._continues = self._own is not None and self._parts.continues(strategy.experience)
        if self._continues:
            return
        stack = LoRAFactors(strategy.model).stack
        self._mean = stack.clone()
        if self.merge != "magmax":
            self._own = None
        if self.merge != "mean" and self._start is None:
            self._start = stack.cpu().clone()

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Restores the adapter where training continues, before the first epoch.

        In ``before_training_exp`` other plugins still see the adapter of the predictions.
        """
        if self._own is not None and strategy.clock.train_exp_epochs == 0:
            LoRAFactors(strategy.model).stack.copy_(self._own)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the experience to the merged adapter."""
        assert self._mean is not None
        self.n_experiences += not self._continues
        factors = LoRAFactors(strategy.model)
        part = is_part(strategy.experience)
        self._own = factors.stack.clone() if part or self.merge == "magmax" else None
        if self.merge == "mean":
            # Exact in the first experience: the weight of the old mean is 0.
            factors.stack.lerp_(self._mean.to(factors.stack), 1 - 1 / self.n_experiences)
        else:
            self._merge_task_vectors(factors)
        self._mean = self._mean if part else None
        self._parts.finish(strategy.experience)

    def _merge_task_vectors(self, factors: LoRAFactors) -> None:
        """Adds a task vector, or replaces that of the task's last part, and merges all."""
        assert self._start is not None
        sizes = torch.tensor([shape.size for shape in factors.shapes])
        used = torch.arange(factors.dim) < sizes[:, None]  # (n_layers, dim), without padding
        own = (factors.stack.cpu() - self._start)[used]
        past = own[:0].view(0, len(own)) if self._vectors is None else self._vectors
        past = past[:-1] if self._continues else past
        if self.merge == "magmax" and len(past) > 1:
            past = largest(past)[None]
        self._vectors = torch.cat((past, own[None]))
        if self.merge == "magmax":
            merged = largest(self._vectors)
        else:
            weights = torch.ones(len(self._vectors))
            merged = ties(list(self._vectors), weights, TIES_DENSITY)
        result = self._start.clone()
        result[used] += merged
        factors.stack.copy_(result)

    def state_dict(self) -> dict[str, Any]:
        """Returns what continues the merge; of a mean of whole tasks, their number alone.

        The mean is the active adapter. After a part of a task, that of the tasks before and the
        task's own adapter are returned too.
        """
        return {
            "merge": self.merge,
            "n_experiences": self.n_experiences,
            "task": self._parts.task,
            "mean": self._mean,
            "own": self._own,
            "start": self._start,
            "vectors": self._vectors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class; its kind must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; the plugin is then unchanged.
        """
        check_keys(state, self.state_dict(), "the state of MergedAdapterPlugin")
        check_same_settings(state, {"merge": self.merge})
        self.n_experiences = state["n_experiences"]
        self._parts.task = state["task"]
        self._mean, self._own = clone_state(state["mean"]), clone_state(state["own"])
        self._start, self._vectors = clone_state(state["start"]), clone_state(state["vectors"])
