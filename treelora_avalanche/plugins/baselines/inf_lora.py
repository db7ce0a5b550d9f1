"""InfLoRA (Liang & Li, CVPR 2024, arXiv 2404.00228): trains in the null space of past inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters import PastAdapters, SubspaceMemory, lora_layers
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.experiences import stream_length
from treelora_avalanche.plugins.baselines.past_adapters import PastAdaptersPlugin
from treelora_avalanche.plugins.training.experience_batches import experience_batches
from treelora_avalanche.state import check_keys, check_same_settings


def input_covariances(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Returns ``Σ x xᵀ / n_samples`` over the inputs of every adapted layer, from one evaluation
    pass.

    Every token is an input. Division by the number of samples keeps the sums from growing with it.

    :param model: a model that carries LoRA.
    :param batches: inputs and targets, on the model's device.
    :return: one ``(n_in, n_in)`` per layer, in float32.
    """
    covariances: dict[nn.Module, Tensor] = {}

    def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().flatten(0, -2)  # (n_tokens, n_in)
        with torch.autocast(x.device.type, enabled=False):  # covariances need float32
            covariances[layer] = covariances[layer] + x.T @ x if layer in covariances else x.T @ x

    layers: list[Any] = list(lora_layers(model).values())
    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    n_samples = 0
    try:
        with evaluating(model):
            for x, _ in batches:
                model(x)
                n_samples += len(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [covariances[layer] / n_samples for layer in layers]


class InfLoRAPlugin(PastAdaptersPlugin):
    """Fixes A to directions of the task's inputs that past inputs do not span, and trains B alone.

    Before an experience, the rows of A become the leading principal directions of the layer's
    inputs on the new data, after projection onto the orthogonal complement of past inputs; then
    ``B A x = 0`` for past inputs x. Afterwards the inputs are added to that subspace, with as many
    directions as hold the share ``threshold`` of their energy; the share rises linearly over the
    stream, ``threshold + (1 - threshold) t / T`` after the t-th of T tasks (from 0). Rows of A have
    the norm ``1 / sqrt(3)`` that LoRA's random ones have on average. Rows without a free direction
    are zero, so their part of B is not trained. The paper's B is A here, and vice versa, as usual
    in LoRA.

    Energy is measured by the squared singular values of the inputs, as in the paper. (The released
    code takes those of the covariance, which keeps far fewer directions.)

    Costs two passes over the data of an experience. Stores the adapter of every task, and at most
    ``n_in^2 / 2`` values per layer in total. Works with any strategy whose model carries LoRA. Task
    labels are not used. Example::

        past = PastAdapters(model)
        strategy = Naive(model, plugins=[InfLoRAPlugin(past, threshold=0.95)])

    :param past: the past adapters of the strategy's model.
    :param threshold: ε, above 0 and below 1.
    :raises ValueError: if ``threshold`` is out of range.
    """

    def __init__(self, past: PastAdapters, threshold: float = 0.95):
        super().__init__(past)
        if not 0 < threshold < 1:
            raise ValueError(
                f"`threshold` should be above 0 and below 1, but is {threshold}. Typical: 0.95."
            )
        self.threshold = threshold
        self.n_tasks = 0
        self.memories: list[SubspaceMemory] = []
        """Subspace of past inputs, one per layer."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Folds the last adapter, and fixes A for the new one."""
        super().before_training_exp(strategy, *args, **kwargs)
        if self._continues:
            return
        if not self.memories:
            self.memories = [SubspaceMemory(shape.n_in) for shape in self._factors.shapes]
        covariances = self._covariances(strategy)
        for (a, _), memory, covariance in zip(
            self._factors.parameters, self.memories, covariances, strict=True
        ):
            a.data.copy_(memory.free_directions(covariance, len(a)) / 3**0.5)

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Drops the gradient of A: every optimizer skips a parameter without one.

        A still requires a gradient, because only trainable parameters are saved.
        """
        for a, _ in self._factors.parameters:
            a.grad = None

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the experience's inputs to the subspace of the past."""
        self.n_tasks += not self._continues
        length = stream_length(strategy.experience)
        done = 0.0 if length is None else min(1.0, (self.n_tasks - 1) / length)
        threshold = self.threshold + (1 - self.threshold) * done
        for memory, covariance in zip(self.memories, self._covariances(strategy), strict=True):
            memory.add(covariance, threshold)
        super().after_training_exp(strategy, *args, **kwargs)

    def _covariances(self, strategy: Any) -> list[Tensor]:
        tokens = not strategy.experience.dataset[0][0].is_floating_point()
        # One text per batch: padding must not count as an input.
        batch_size = 1 if tokens else strategy.eval_mb_size
        return input_covariances(strategy.model, experience_batches(strategy, batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Returns the past adapters, and the subspaces of their inputs."""
        return {
            **super().state_dict(),
            "threshold": float(self.threshold),
            "n_tasks": self.n_tasks,
            "memories": [memory.state_dict() for memory in self.memories],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the past adapters into the model, and the subspaces; the threshold must be the
        same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; nothing has changed then.
        """
        check_keys(
            state,
            {"past", "task", "threshold", "n_tasks", "memories"},
            "the state of InfLoRAPlugin",
        )
        check_same_settings(state, {"threshold": self.threshold})
        memories = []
        for kept in state["memories"]:
            memories.append(SubspaceMemory(kept["basis"].shape[-1]))
            memories[-1].load_state_dict(kept)
        super().load_state_dict({"past": state["past"], "task": state["task"]})
        self.n_tasks, self.memories = int(state["n_tasks"]), memories
