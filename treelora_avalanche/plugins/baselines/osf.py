"""Orthogonal subspace fine-tuning (Nayak et al., ICLR 2026, arXiv 2504.07097), by peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from peft import OSFConfig, OSFModel
from torch import nn

from treelora_avalanche.adapters import find_host
from treelora_avalanche.adapters.trainable_view import TrainableView
from treelora_avalanche.experiences import stream_length
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, set_parameters


class OSFPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Trains weights in the subspace that is orthogonal to their largest singular directions.

    Before an experience, peft decomposes each weight, ``W = U_high S_high V_high + U_low S_low
    V_low``, and trains the second term, with gradients of U_low and V_low projected off U_high and
    V_high. Afterwards the weight becomes the sum again (``merge_and_unload``: ``unload``, which
    peft's guide names, discards what was trained), to be decomposed anew before the next one. Of n
    tasks, the k-th preserves the share ``(k - 1) / n`` of the singular directions, at least one, as
    peft's guide advises for streams of known length; where it is unknown, n is k. Steps of plain
    SGD are orthogonal to what is preserved; those of Adam, which rescales each coordinate of a
    projected gradient, only roughly: with 1/3 of the directions preserved, 6% of the squared change
    of a tiny ViT lies in them or their rows and columns, and 38% of a random one.

    Between experiences the model has its own layers, whose weights are trainable parameters. Stores
    nothing per task. Task labels are not used. Example::

        # view: a TrainableView of a model with these weights and its classifier trainable
        strategy = Naive(view, optimizer, plugins=[OSFPlugin(["blocks.0.attn.qkv"])])

    :param names: names of the linear layers, see
        :func:`~treelora_avalanche.adapters.find_adaptable_layers`.
    """

    requires_whole_adapter: str | None = "decomposes the same weights in every experience"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = list(names)
        self.n_tasks = 0
        self._parts = TaskParts()
        self._tuner: OSFModel | None = None

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Ends an interrupted experience."""
        self.end_interrupted(strategy)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Decomposes the weights, and gives their trainable parts to the optimizer."""
        experience = strategy.experience
        number = self.n_tasks + (not self._parts.continues(experience))
        length = stream_length(experience) or number
        self._decompose(strategy.model, min(number, length) - 1, length)
        set_parameters(strategy.optimizer, strategy.model.parameters())

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Merges what was trained into the weights."""
        self.end_interrupted(strategy)
        self.n_tasks += not self._parts.continues(strategy.experience)
        self._parts.finish(strategy.experience)

    def _decompose(self, model: nn.Module, n_past: int, n_tasks: int) -> None:
        network = network_of(model)
        smallest = min(min(weight.shape) for weight in self._weights(network))
        # peft takes a share of each weight's rank, and no rank of 0.
        preserved = n_past / n_tasks if n_past * smallest >= n_tasks else 1
        trained = [p for p in network.parameters() if p.requires_grad]
        config = OSFConfig(effective_rank=preserved, target_modules=self.names)
        self._tuner = OSFModel(network, config, "default")
        weights = {id(weight) for weight in self._weights(network)}
        for parameter in trained:  # peft has frozen the classifier too
            parameter.requires_grad_(id(parameter) not in weights)

    def end_interrupted(self, strategy: Any) -> None:
        """Merges what is being trained into the weights, as it is.

        :param strategy: the strategy.
        """
        if self._tuner is None:
            return
        self._tuner.merge_and_unload()
        self._tuner = None
        for weight in self._weights(network_of(strategy.model)):
            weight.requires_grad_()
        set_parameters(strategy.optimizer, strategy.model.parameters())

    def _weights(self, network: nn.Module) -> list[nn.Parameter]:
        layers: list[Any] = [network.get_submodule(name) for name in self.names]
        return [getattr(layer, "base_layer", layer).weight for layer in layers]

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of tasks, on which the preserved share depends."""
        return {"n_tasks": self.n_tasks, "task": self._parts.task}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of another plugin of this class.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if keys are missing or unknown; the plugin is then unchanged.
        """
        check_keys(state, {"n_tasks", "task"}, "the state of OSFPlugin")
        self.n_tasks, self._parts.task = int(state["n_tasks"]), state["task"]


def network_of(model: nn.Module) -> nn.Module:
    """Returns the network whose layers :func:`find_adaptable_layers` names.

    :param model: a model, or a view of one.
    """
    host = find_host(model)
    if host is not None:
        return host.network
    return model.module if isinstance(model, TrainableView) else model
