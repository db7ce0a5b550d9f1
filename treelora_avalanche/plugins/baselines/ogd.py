"""Orthogonal gradient descent (Farajtabar et al., AISTATS 2020, arXiv 1910.07104)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from treelora_avalanche.adapters import new_directions, project_off
from treelora_avalanche.models.token_loss import TokenCrossEntropy
from treelora_avalanche.plugins.training.experience_batches import experience_batches
from treelora_avalanche.state import check_keys, check_same_settings


def ground_truth_outputs(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the output for the true target, one number per sample.

    For images, the logit of the true class. For text, where logits of different positions cannot be
    compared, the log-likelihood of the target tokens, per token.

    :param logits: ``(batch, n_classes)``, or ``(batch, vocabulary, length)``.
    :param targets: ``(batch,)``, or ``(batch, length)`` with -100 where there is no target.
    :return: ``(batch,)``.
    """
    if logits.ndim == 2:
        return logits.gather(1, targets[:, None]).squeeze(1)
    targets = targets[:, : logits.shape[2]]  # a language model crops its batch
    likelihoods: Tensor = -TokenCrossEntropy(reduction="none")(logits, targets)
    return likelihoods


class OGDPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Projects every step onto the orthogonal complement of past gradients.

    After an experience, gradients of single samples are stored, of the output for the true target
    (the paper's OGD-GTL), over all trained parameters: the LoRA factors, and the classifier if
    there is one. They are kept as an orthonormal basis V. The step d of the optimizer becomes
    ``d <- d − Vᵀ V d``, so that a small one leaves those outputs unchanged; the projection is two
    products with one matrix.

    The paper projects the gradient, and trains with SGD, where that is the same: its step is linear
    in the gradient. Adam's is not. It scales every coordinate by itself and remembers gradients of
    the previous task, so the step of a projected gradient is not orthogonal to V. Projecting both,
    as this plugin did before, is: but Adam then enlarges what little the first projection left
    (docs/methods.md has both, measured).

    Stores ``samples_per_task`` vectors per task, each as long as the trained parameters, up to
    ``memory_size``. Beyond it all tasks have equal shares, and each keeps its strongest directions.
    Works with any strategy. Task labels are not used. Example::

        strategy = Naive(model, plugins=[OGDPlugin(samples_per_task=200)])

    :param samples_per_task: samples of an experience whose gradients are stored; 200 in the paper.
    :param memory_size: budget of vectors over all tasks.
    :raises ValueError: if an argument is out of range, or the budget is below one task.
    """

    requires_whole_adapter: str | None = "projects steps of the whole adapter"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""
    needed_to_predict = False
    """Read by :func:`~treelora_avalanche.checkpoint.prediction_state`."""

    def __init__(self, samples_per_task: int = 200, memory_size: int = 1000):
        super().__init__()
        if samples_per_task < 1:
            raise ValueError(
                f"`samples_per_task` should be at least 1, but is {samples_per_task}. The paper's "
                "is 200."
            )
        if memory_size < samples_per_task:
            raise ValueError(
                f"`memory_size` should be at least `samples_per_task` ({samples_per_task}), but is "
                f"{memory_size}. Raise it, or lower `samples_per_task`."
            )
        self.samples_per_task = samples_per_task
        self.memory_size = memory_size
        self.basis = torch.empty(0, 0)
        """Orthonormal rows, ``(n_vectors, n_values)``."""
        self.counts: list[int] = []
        """Number of vectors of each task, in the order of the rows."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Collects the trained parameters."""
        self._parameters = [p for p in strategy.model.parameters() if p.requires_grad]
        n_values = sum(p.numel() for p in self._parameters)
        if not self.counts:
            self.basis = torch.empty(0, n_values)
        if self.basis.shape[1] != n_values:
            raise ValueError(
                f"the trained parameters should have {self.basis.shape[1]} values, as the stored "
                f"gradients, but have {n_values}. Train the same parameters in every experience."
            )
        self.basis = self.basis.to(self._parameters[0].device)

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records where the step starts."""
        if self.counts:
            self._start = self._flat([p.detach() for p in self._parameters])

    @torch.no_grad()
    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Projects the step."""
        if self.counts:
            step = self._flat([p.detach() for p in self._parameters]) - self._start
            for parameter, part in self._parts(self._start + project_off(step, self.basis)):
                parameter.copy_(part)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the new directions of the experience's gradients to the basis."""
        gradients = self._gradients(strategy)  # (n_samples, n_values)
        share = min(self.samples_per_task, self.memory_size // (len(self.counts) + 1))
        kept = [part[:share] for part in self.basis.split(self.counts)]
        basis = torch.cat((self.basis[:0], *kept))
        kept.append(new_directions(gradients, basis)[:share])
        self.basis = torch.cat((basis, kept[-1]))
        self.counts = [len(part) for part in kept]

    def _gradients(self, strategy: Any) -> Tensor:
        """Returns gradients of single samples in evaluation mode, ``(n_samples, n_values)``."""
        was_training = strategy.model.training
        strategy.model.eval()
        rows = []
        with torch.enable_grad():
            for x, y in experience_batches(strategy, 1, self.samples_per_task):
                truth = ground_truth_outputs(strategy.model(x), y).sum()
                gradient = torch.autograd.grad(truth, self._parameters, allow_unused=True)
                rows.append(self._flat(gradient))
        strategy.model.train(was_training)
        return torch.stack(rows)

    def _flat(self, values: Any) -> Tensor:
        """Returns all values as one vector; zeros for a parameter without any."""
        return torch.cat(
            [
                (torch.zeros_like(p) if v is None else v).flatten().float()
                for p, v in zip(self._parameters, values, strict=True)
            ]
        )

    def _parts(self, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        parts = flat.split([p.numel() for p in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            yield parameter, part.view_as(parameter)

    def state_dict(self) -> dict[str, Any]:
        """Returns the basis, not copied, and the number of vectors of each task."""
        return {
            "samples_per_task": self.samples_per_task,
            "memory_size": self.memory_size,
            "basis": self.basis,
            "counts": list(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class; its budget must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; the basis is then unchanged.
        """
        check_keys(state, self.state_dict(), "the state of OGDPlugin")
        check_same_settings(
            state, {"samples_per_task": self.samples_per_task, "memory_size": self.memory_size}
        )
        if len(state["basis"]) != sum(state["counts"]):
            raise ValueError(
                f"the state should have {sum(state['counts'])} stored gradients, but has "
                f"{len(state['basis'])}. Use another copy of the state."
            )
        self.basis = state["basis"].detach().clone()
        self.counts = list(state["counts"])
