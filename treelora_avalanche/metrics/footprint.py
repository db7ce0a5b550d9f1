"""Counts the bytes that a method stores, and the parameters that it trains."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_CODE = (type, FunctionType, MethodType, ModuleType)


def _tensors_below(value: Any, visited: set[int], depth: int = 0) -> Iterator[Tensor]:
    """All tensors reachable from a plugin's state."""
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
    """Returns the bytes of the tensors and texts that a strategy's plugins keep between tasks.

    Of a plugin with a ``state_dict``, these are the tensors in it; of others, all that it refers
    to. Parameters and buffers of the model do not count. Texts in a plugin's ``stored_texts`` count
    as UTF-8. Stored images count as the tensors that the model receives, stored token sequences
    four bytes per token of prompt and answer, without padding; though Avalanche keeps references
    into the benchmark's own data. Evaluation and counters do not count, nor does a plugin with
    ``is_stored = False``.

    :param strategy: an Avalanche strategy between two tasks.
    """

    def storage(tensor: Tensor) -> tuple[int, int]:
        if isinstance(tensor, DTensor):  # sharded over processes
            tensor = tensor.to_local()
        memory = tensor.untyped_storage()
        return memory.data_ptr(), memory.nbytes()

    def view(tensor: Tensor) -> tuple[int, int]:
        # Its storage may be larger, where it grows from task to task.
        return tensor.data_ptr(), tensor.nbytes

    plugins = [
        plugin
        for plugin in strategy.plugins
        if getattr(plugin, "is_stored", True)
        and not isinstance(plugin, EvaluationPlugin)
        and plugin is not strategy.clock
    ]
    model = getattr(strategy.model, "module", strategy.model)
    # A checkpoint of the model holds these; buffers outside it are a plugin's (past adapters).
    of_model = {storage(t)[0] for t in (*model.parameters(), *model.state_dict().values())}
    passing = ("loss", "mb_output")
    own_tensors = [
        value
        for name, value in vars(strategy).items()
        if isinstance(value, Tensor) and name not in passing
    ]
    # All states at once: none may be freed, and its address used again, while others are counted.
    states = [plugin.state_dict() for plugin in plugins if hasattr(plugin, "state_dict")]
    others = [plugin for plugin in plugins if not hasattr(plugin, "state_dict")]
    kept = {storage(t) for t in _tensors_below([others, own_tensors], {id(strategy)})}
    kept |= {view(t) for t in _tensors_below(states, set())}
    tensors = sum(size for address, size in kept if address not in of_model)
    texts = [text for plugin in plugins for text in getattr(plugin, "stored_texts", ())]
    return tensors + sum(len(text.encode()) for text in texts) + _stored_samples_bytes(strategy)


def _stored_samples_bytes(strategy: Any) -> int:
    """Bytes of the samples in a replay memory, or in a cumulative training set."""
    memories = [getattr(plugin, "storage_policy", None) for plugin in strategy.plugins]
    stores = [memory.buffer for memory in memories if memory is not None]
    if getattr(strategy, "dataset", None) is not None:
        stores.append(strategy.dataset)
    return sum(_samples_bytes(store) for store in stores if len(store))


def _samples_bytes(store: Any) -> int:
    if hasattr(store, "lengths"):  # of tokens without the last, see `TokenSequences`
        return sum(4 * (int(length) + 1) for length in store.lengths)
    first = store[0][0]
    if first.ndim > 1:  # images have one shape, and reading each would take its time
        return len(store) * int(first.nbytes)
    return sum(int(sample[0].nbytes + sample[1].nbytes) for sample in store)


def count_parameters(model: nn.Module, *, trained: bool = True) -> dict[str, int]:
    """Returns the numbers of trainable and of all parameters.

    :param model: a strategy's model, which may be a view that shows the trainable ones alone.
    :param trained: False if no gradient updates any of them, as where a head is set from
        statistics.
    """
    # Not `model.parameters()`, which a view restricts to the trainable ones.
    parameters = [parameter for _, parameter in nn.Module.named_parameters(model)]
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad and trained),
        "total": sum(p.numel() for p in parameters),
    }


__all__ = ["count_parameters", "stored_bytes"]
