"""Memory footprint of a strategy: bytes stored between tasks, and numbers of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from treelora_avalanche.runs.monitors import ProgressPlugin

_CODE = (type, FunctionType, MethodType, ModuleType)


def _tensors_below(value: Any, visited: set[int], depth: int = 0) -> Iterator[Tensor]:
    """Yields all tensors reachable from a value."""
    if id(value) in visited or depth > 12:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_below(item, visited, depth + 1)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors_below(item, visited, depth + 1)
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
        yield from _tensors_below(vars(value), visited, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, _CODE):
        yield from _tensors_below(vars(value), visited, depth + 1)


def stored_bytes(strategy: Any) -> int:
    """Returns the bytes that a strategy stores between tasks in addition to its model.

    Counts the tensors in the ``state_dict`` of each plugin; of a plugin without one, all tensors
    that it refers to. Stored samples count as the tensors that the model receives, although
    Avalanche keeps references into the benchmark's data. Evaluation and counters are excluded.

    >>> stored_bytes(Naive(model=model, optimizer=optimizer, evaluator=None))
    0

    :param strategy: an Avalanche strategy, between two tasks.
    """

    def storage(tensor: Tensor) -> tuple[int, int]:
        if isinstance(tensor, DTensor):  # sharded over processes
            tensor = tensor.to_local()
        memory = tensor.untyped_storage()
        return memory.data_ptr(), memory.nbytes()

    def view(tensor: Tensor) -> tuple[int, int]:
        # Not its storage, which may be over-allocated for the tasks to come.
        return tensor.data_ptr(), tensor.nbytes

    own = (EvaluationPlugin, ProgressPlugin)
    plugins = [
        plugin
        for plugin in strategy.plugins
        if not isinstance(plugin, own) and plugin is not strategy.clock
    ]
    model = getattr(strategy.model, "module", strategy.model)
    # The content of a checkpoint: buffers that are not in it belong to a plugin (past adapters).
    of_model = {storage(t)[0] for t in (*model.parameters(), *model.state_dict().values())}
    passing = ("loss", "mb_output")
    own_tensors = [
        value
        for name, value in vars(strategy).items()
        if isinstance(value, Tensor) and name not in passing
    ]
    # All states at once: if one were freed, the next could have the same address.
    states = [plugin.state_dict() for plugin in plugins if hasattr(plugin, "state_dict")]
    others = [plugin for plugin in plugins if not hasattr(plugin, "state_dict")]
    kept = {storage(t) for t in _tensors_below([others, own_tensors], {id(strategy)})}
    kept |= {view(t) for t in _tensors_below(states, set())}
    tensors = sum(size for address, size in kept if address not in of_model)
    return tensors + _stored_samples_bytes(strategy)


def _stored_samples_bytes(strategy: Any) -> int:
    """Returns the bytes of the samples in replay memories and cumulative training sets."""
    memories = [getattr(plugin, "storage_policy", None) for plugin in strategy.plugins]
    stores = [memory.buffer for memory in memories if memory is not None]
    if getattr(strategy, "dataset", None) is not None:
        stores.append(strategy.dataset)
    return sum(_samples_bytes(store) for store in stores if len(store))


def _samples_bytes(store: Any) -> int:
    first = store[0][0]
    if first.ndim > 1:  # images: one shape, and slow to read one by one
        return len(store) * int(first.nbytes)
    return sum(int(sample[0].nbytes + sample[1].nbytes) for sample in store)


def count_parameters(model: nn.Module, *, trained: bool = True) -> dict[str, int]:
    """Returns the numbers of trainable and of all parameters.

    :param model: a strategy's model.
    :param trained: whether parameters are trained by gradients at all.
    """
    # Not `model.parameters()`: a `TrainableView` overrides it to yield the trainable ones only.
    parameters = [parameter for _, parameter in nn.Module.named_parameters(model)]
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad and trained),
        "total": sum(p.numel() for p in parameters),
    }


__all__ = ["count_parameters", "stored_bytes"]
