"""Fits the router that selects an adapter, or none, for each prompt."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank
from treelora_avalanche.experiences import samples_of
from treelora_avalanche.models.features.discriminant import Discriminant, leave_one_out_distances
from treelora_avalanche.models.features.signature import stack_samples
from treelora_avalanche.models.token_batches import prompt_lengths
from treelora_avalanche.models.views.prompt_router import PromptRouter
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, check_same_settings
from treelora_avalanche.tree import AdapterTree

logger = logging.getLogger(__name__)

SEPARABLE = 0.75
"""Share of prompts, each left out of the fit, that a router has to tell from those of another task.
At chance level, 0.5, the tasks have the same prompts."""


class RoutedTask(NamedTuple):
    """What the router knows of a task.

    :param task: number of the task, in the order of training, whose adapter its prompts get.
    :param name: name of that task.
    :param features: features of training prompts, ``(n_samples, dim)``, on the host.
    :param n_tasks: number of tasks that it stands for: itself, and earlier ones with such prompts.
    """

    task: int
    name: str
    features: Tensor
    n_tasks: int = 1


class PromptRouterPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Fits the router of a :class:`RoutedLanguageModel` after every task, in closed form.

    Tasks are Gaussians of the frozen network's features with one covariance (linear discriminant
    analysis, :class:`~treelora_avalanche.models.features.discriminant.Discriminant`). A prompt
    whose distance to the nearest task is above the threshold is foreign, and gets the base model:
    the threshold is a quantile of the distances of the training prompts, each left out of the fit.

    A task whose prompts the router cannot tell from those of earlier ones, see :data:`SEPARABLE`,
    is that task returning: its adapter in the bank becomes the mean of theirs, and is used for the
    prompts of all. No past text is kept; per task ``n_samples * dim`` values are, on the host. In
    an online stream the parts of a task are one task. Task labels are not used. Example::

        tree, bank = AdapterTree(), AdapterBank()
        view = RoutedLanguageModel(add_lora(model), bank)
        plugins = [TreeBuilderPlugin(tree, bank), PromptRouterPlugin(tree)]
        strategy = SeqLoRA(view, plugins=plugins)

    :param tree: the tree that maps a task to its adapter; its
        :class:`~treelora_avalanche.plugins.TreeBuilderPlugin` must come before this plugin. None:
        every task has an adapter of its own.
    :param quantile: quantile of the training distances beyond which a prompt is foreign, in (0, 1);
        None for never.
    :param n_samples: number of training prompts per task whose features are kept, at most.
    :param seed: seed of their choice.
    :raises ValueError: if an argument is out of range.
    """

    requires_whole_adapter: str | None = "predicts with a whole adapter per task"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(
        self,
        tree: AdapterTree | None = None,
        *,
        quantile: float | None = 0.99,
        n_samples: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        if quantile is not None and not 0 < quantile < 1:
            raise ValueError(
                f"`quantile` should be above 0 and below 1, but is {quantile}. Pass None if no "
                "prompt is foreign."
            )
        if n_samples < 1:
            raise ValueError(f"`n_samples` should be at least 1, but is {n_samples}.")
        self.tree = tree
        self.quantile = quantile
        self.n_samples = n_samples
        self.seed = seed
        self.tasks: list[RoutedTask] = []
        self._n_tasks = 0
        self._parts = TaskParts()
        self._before: list[RoutedTask] | None = None
        """The tasks before the one that the last experience was a part of."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Routes to the tasks before, if this is a further part of a task."""
        if self._before is not None and self._parts.continues(strategy.experience):
            self.tasks, self._n_tasks = list(self._before), self._n_tasks - 1
            self._fit(strategy.model)
        else:
            self._before = list(self.tasks)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the features of the task's prompts, and refits the router."""
        task = self._n_tasks
        name = str(getattr(strategy.experience, "task_name", f"task {task}"))
        new = RoutedTask(task, name, self._features(strategy))
        self.tasks, earlier = _joined(self.tasks, new, self.n_samples)
        self._n_tasks += 1
        if earlier is not None:
            self._average(strategy.model.bank, self.tasks[-1], earlier)
        self._fit(strategy.model)
        self._parts.finish(strategy.experience)

    def _average(self, bank: AdapterBank, new: RoutedTask, earlier: RoutedTask) -> None:
        """Replaces the new task's adapter by the mean over all tasks that it stands for."""
        kept, other = self._adapter_of(new.task), self._adapter_of(earlier.task)
        if kept != other:  # else the tree has merged them
            bank.average(kept, other, 1 / new.n_tasks)

    def _adapter_of(self, task: int) -> int:
        return task if self.tree is None else self.tree.adapter_of_task[task]

    def _features(self, strategy: Any) -> Tensor:
        view: RoutedLanguageModel = strategy.model
        dataset = samples_of(strategy.experience)
        generator = torch.Generator().manual_seed(self.seed + self._n_tasks)
        rows = torch.randperm(len(dataset), generator=generator)[: self.n_samples].tolist()
        batches = []
        for start in range(0, len(rows), strategy.eval_mb_size):
            of_batch = rows[start : start + strategy.eval_mb_size]
            tokens, targets = stack_samples(dataset, of_batch)
            lengths = prompt_lengths(tokens, targets)
            tokens = tokens[:, : int(lengths.max())].to(strategy.device)
            batches.append(view.frozen_features(tokens, lengths.to(strategy.device)).cpu())
        return torch.cat(batches)

    def _fit(self, view: RoutedLanguageModel) -> None:
        """Fits the router; it depends on the features alone."""
        if not self.tasks:
            view.router = None
            return
        device = next(view.module.parameters()).device
        features = [task.features for task in self.tasks]
        threshold, spread = self._calibrate(features)
        tasks = tuple(task.task for task in self.tasks)
        adapters = [self._adapter_of(task) for task in tasks]
        view.router = PromptRouter(
            Discriminant(*(part.to(device) for part in Discriminant.fit(features))),
            torch.tensor(adapters, device=device),
            tasks,
            tuple(task.name for task in self.tasks),
            threshold,
            spread,
        )

    def _calibrate(self, features: list[Tensor]) -> tuple[float, float]:
        """Returns the threshold and the spread, see :class:`PromptRouter`."""
        distances = leave_one_out_distances(features)
        distances = distances[distances.isfinite().all(1)]
        if not len(distances):  # one prompt per task
            return torch.inf, 1.0
        nearest = distances.amin(1)
        spread = nearest.square().mean().item() / features[0].shape[1]
        if self.quantile is None:
            return torch.inf, max(1.0, spread)
        return nearest.quantile(self.quantile).item(), max(1.0, spread)

    def prepare_loaded(self, strategy: Any) -> None:
        """Fits the router of a strategy that has just been loaded.

        :param strategy: the strategy, all of whose plugins are loaded.
        """
        self._fit(strategy.model)

    def state_dict(self) -> dict[str, Any]:
        """Returns the features of the tasks so far, and the arguments."""
        return {
            "tasks": [task._asdict() for task in self.tasks],
            "before": self._before and [task._asdict() for task in self._before],
            "n_tasks": self._n_tasks,
            "task": self._parts.task,
            **self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {"quantile": self.quantile, "n_samples": self.n_samples, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if its arguments differ.
        """
        keys = {"tasks", "before", "n_tasks", "task", *self._settings()}
        check_keys(state, keys, "the state of PromptRouterPlugin")
        check_same_settings(state, self._settings())
        before = state["before"]
        self.tasks = [RoutedTask(**task) for task in state["tasks"]]
        self._before = None if before is None else [RoutedTask(**task) for task in before]
        self._n_tasks, self._parts.task = state["n_tasks"], state["task"]


def _joined(
    tasks: list[RoutedTask], new: RoutedTask, n_samples: int
) -> tuple[list[RoutedTask], RoutedTask | None]:
    """Returns the tasks with a new one, and the earlier one that returns, if it does."""
    if not tasks:
        return [new], None
    told = _told_apart([task.features for task in tasks], new.features)
    nearest = min(range(len(tasks)), key=told.__getitem__)
    if told[nearest] >= SEPARABLE:
        logger.info(
            "the router tells the prompts of %s from those of the nearest task, %s, in %.0f%%",
            *(new.name, tasks[nearest].name, 100 * told[nearest]),
        )
        return [*tasks, new], None
    earlier = tasks[nearest]
    logger.info(
        "the router cannot tell the prompts of %s from those of %s (right in %.0f%%): the mean of "
        "their adapters is used for both",
        *(new.name, earlier.name, 100 * told[nearest]),
    )
    # Of both equally many, so that neither hides the other.
    n_earlier = min(len(earlier.features), max(n_samples // 2, n_samples - len(new.features)))
    both = torch.cat([earlier.features[:n_earlier], new.features[: n_samples - n_earlier]])
    new = new._replace(features=both, n_tasks=earlier.n_tasks + 1)
    return [*tasks[:nearest], *tasks[nearest + 1 :], new], earlier


def _told_apart(tasks: list[Tensor], new: Tensor) -> list[float]:
    """Returns, for each task, how many of its and the new one's prompts are nearer to their own."""
    classes = [*tasks, new]
    distances = leave_one_out_distances(classes).split([len(c) for c in classes])
    new_to_all = distances[-1]
    shares = []
    for k in range(len(tasks)):
        right = [distances[k][:, k] < distances[k][:, -1], new_to_all[:, -1] < new_to_all[:, k]]
        # The mean of the two shares: a task with few prompts counts as much.
        shares.append(sum(r.float().mean().item() for r in right) / 2)
    return shares
