"""Prompts, their keys, and the selection of prompts by a query; independent of the backbone.

L2P (Wang et al., CVPR 2022) has one pool that all tasks share; DualPrompt (Wang et al., ECCV 2022)
and HiDe-Prompt (Wang et al., NeurIPS 2023) have one prompt per task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.state import check_keys


def cosine_similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """Returns the cosine between every query and every key.

    :param queries: ``(batch, dim)``.
    :param keys: ``(n_keys, dim)``.
    :return: ``(batch, n_keys)``.
    """
    return F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T


def check_momentum(momentum: float) -> None:
    """Raises an error for a weight of the past prompts outside [0, 1).

    :param momentum: the weight.
    :raises ValueError: if it is not at least 0 and below 1.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` should be at least 0 and below 1, but is {momentum}.")


def check_length(name: str, length: int) -> None:
    """Raises an error for an empty prompt.

    :param name: name of the argument.
    :param length: number of positions of a prompt.
    :raises ValueError: if it is below 1.
    """
    if length < 1:
        raise ValueError(f"`{name}` should be at least 1, but is {length}.")


def check_layers(name: str, layers: Sequence[int], n_layers: int) -> None:
    """Raises an error for block numbers that a transformer does not have.

    :param name: name of the argument.
    :param layers: the block numbers.
    :param n_layers: number of blocks of the transformer.
    :raises ValueError: if there are none, one is out of range, or one comes twice.
    """
    known = range(n_layers)
    if not layers or len(set(layers)) < len(layers) or any(layer not in known for layer in layers):
        raise ValueError(
            f"`{name}` should name different blocks of the model, which are 0 to {n_layers - 1}, "
            f"but is {list(layers)}."
        )


def check_dual_prompts(
    *,
    general_layers: Sequence[int],
    general_length: int,
    expert_layers: Sequence[int],
    expert_length: int,
    n_layers: int,
) -> None:
    """Raises an error for general and expert prompts that a transformer cannot take.

    :param general_layers: block numbers of the general prompts.
    :param general_length: their length.
    :param expert_layers: block numbers of the expert prompts.
    :param expert_length: their length.
    :param n_layers: number of blocks of the transformer.
    :raises ValueError: if one is out of range, or a block would take both kinds.
    """
    check_length("general_length", general_length)
    check_length("expert_length", expert_length)
    check_layers("general_layers", general_layers, n_layers)
    check_layers("expert_layers", expert_layers, n_layers)
    if set(general_layers) & set(expert_layers):
        raise ValueError(
            "`general_layers` and `expert_layers` should have no block in common, but are "
            f"{list(general_layers)} and {list(expert_layers)}. Give each block one kind of prompt."
        )


class PromptPool(nn.Module):
    """Pool of prompts, of which every sample takes those whose keys are nearest to its query.

    The prompts of a sample do not depend on the other samples of the batch::

        pool = PromptPool(pool_size=10, length=5, top_k=5, dim=768)
        prompts = pool.take(pool.pick(queries))  # (batch, 25, 768)

    :param pool_size: number of prompts.
    :param length: number of tokens per prompt.
    :param top_k: number of prompts per sample.
    :param dim: dimension of tokens and queries.
    :raises ValueError: if a number is below 1, or ``top_k`` above ``pool_size``.
    """

    def __init__(self, *, pool_size: int, length: int, top_k: int, dim: int):
        super().__init__()
        for name, value in (("pool_size", pool_size), ("prompt_length", length), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"`{name}` should be at least 1, but is {value}.")
        if top_k > pool_size:
            raise ValueError(
                f"`top_k` should be at most {pool_size}, the size of the pool, but is {top_k}. "
                "Lower it, or raise `pool_size`."
            )
        self.top_k = top_k
        self.prompts = nn.Parameter(torch.empty(pool_size, length, dim).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(pool_size, dim).uniform_(-1, 1))

    def pick(self, queries: Tensor) -> Tensor:
        """Returns the indices of every sample's prompts, ``(batch, top_k)``, the nearest first.

        :param queries: ``(batch, dim)``.
        """
        return cosine_similarity(queries, self.keys).topk(self.top_k, dim=1).indices

    def take(self, picks: Tensor) -> Tensor:
        """Returns the picked prompts, concatenated: ``(batch, top_k * length, dim)``.

        :param picks: return value of :meth:`pick`.
        """
        return self.prompts[picks].flatten(1, 2)

    def distance(self, queries: Tensor, picks: Tensor) -> Tensor:
        """Returns ``sum_k (1 - cos(query, key_k))`` over picked keys, mean over samples (Eq. 5).

        :param queries: ``(batch, dim)``.
        :param picks: return value of :meth:`pick`.
        :return: a scalar, differentiable in the picked keys.
        """
        similarity = cosine_similarity(queries, self.keys).gather(1, picks)
        return (1 - similarity).sum(1).mean()


class TaskPrompts(nn.Module):
    """One prompt for every task, and optionally one key; only those of the last task are trained.

    A new task starts from the prompt of the one before, and from a random key. The past is held in
    buffers that are not part of ``state_dict``: parameters and optimizer contain the active prompt
    alone, so no momentum moves a past one, and no pool size limits the number of tasks.

    With ``momentum`` m above 0 the prompt in use is an ensemble with the past ones (HiDe-Prompt):
    ``(1 - m) * active + m * mean(past)``::

        prompts = TaskPrompts((5, 2, 20, 12, 64), key_dim=768)
        prompts.current()  # of the active task
        prompts.fold()  # after a task
        prompts.stacked()[prompts.match(queries)]  # of the task nearest to each query

    :param shape: shape of a prompt.
    :param key_dim: dimension of the keys; None for prompts without keys.
    :param momentum: weight of the past prompts, at least 0 and below 1.
    :raises ValueError: if ``momentum`` is out of range.
    """

    past: Tensor
    past_keys: Tensor
    past_mean: Tensor

    def __init__(self, shape: Sequence[int], *, key_dim: int | None = None, momentum: float = 0.0):
        super().__init__()
        check_momentum(momentum)
        self.momentum = momentum
        self.active = nn.Parameter(torch.empty(*shape).uniform_(-1, 1))
        self.key: nn.Parameter | None = None
        if key_dim is not None:
            self.key = nn.Parameter(torch.empty(key_dim).uniform_(-1, 1))
        self.register_buffer("past", torch.empty(0, *shape), persistent=False)
        self.register_buffer("past_mean", torch.zeros(*shape), persistent=False)
        self.register_buffer("past_keys", torch.empty(0, key_dim or 0), persistent=False)

    def __len__(self) -> int:
        """Returns the number of tasks, the active one included."""
        return len(self.past) + 1

    def current(self) -> Tensor:
        """Returns the prompt in use for the active task, of the given shape."""
        if self.momentum == 0 or len(self.past) == 0:
            return self.active
        return torch.lerp(self.active, self.past_mean, self.momentum)

    def stacked(self) -> Tensor:
        """Returns the prompts of all tasks, ``(n_tasks, *shape)``, the active one last."""
        return torch.cat((self.past, self.current()[None]))

    def match(self, queries: Tensor) -> Tensor:
        """Returns the task whose key is nearest to each query by cosine, ``(batch,)``.

        :param queries: ``(batch, dim)``.
        :raises ValueError: if the prompts have no keys.
        """
        keys = torch.cat((self.past_keys, self._key()[None]))
        return cosine_similarity(queries, keys).argmax(1)

    def distance(self, queries: Tensor) -> Tensor:
        """Returns the mean over samples of ``1 - cos(query, key of the active task)``, a scalar.

        :param queries: ``(batch, dim)``.
        :raises ValueError: if the prompts have no keys.
        """
        return (1 - cosine_similarity(queries, self._key()[None])).mean()

    def _key(self) -> nn.Parameter:
        if self.key is None:
            raise ValueError("`key_dim` should be given to match queries, but is None.")
        return self.key

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the active prompt and key to the past, and starts those of a new task.

        The new prompt starts as a copy of the old one. The new key is random: a copy would be
        pulled towards the queries of two tasks, and become the nearest to everything.
        """
        prompt = self.current().detach().clone()
        self._set_past(torch.cat((self.past, prompt[None])))
        self.active.copy_(prompt)
        if self.key is not None:
            self.past_keys = torch.cat((self.past_keys, self.key.detach()[None]))
            self.key.uniform_(-1, 1)

    def _set_past(self, past: Tensor) -> None:
        self.past = past
        if len(past):
            self.past_mean = past.mean(0)

    def past_state(self) -> dict[str, Any]:
        """Returns the past prompts and keys, not copied; the active ones are parameters."""
        return {"prompts": self.past, "keys": self.past_keys}

    def load_past_state(self, state: dict[str, Any]) -> None:
        """Replaces the past tasks by those of a state.

        :param state: return value of :meth:`past_state`.
        :raises ValueError: if its shapes differ; the past is then unchanged.
        """
        check_keys(state, {"prompts", "keys"}, "the state of TaskPrompts")
        prompts, keys = state["prompts"], state["keys"]
        n_keys = len(prompts) if self.key is not None else 0
        found = tuple(prompts.shape), tuple(keys.shape)
        expected = (len(prompts), *self.active.shape), (n_keys, self.past_keys.shape[1])
        if found != expected:
            raise ValueError(
                f"the past prompts in the state should be {expected[0]} with keys {expected[1]}, "
                f"but are {found[0]} with keys {found[1]}. Build the strategy with the same "
                "lengths and layers."
            )
        self.past_keys = keys.detach().to(self.active, copy=True)
        self._set_past(prompts.detach().to(self.active, copy=True))


class DualPrompted(nn.Module):
    """Base of DualPrompt's models: general prefixes of all tasks, expert prefixes of each task.

    In training mode the active expert prefix is in use; in evaluation mode every sample takes that
    of the task whose key is nearest to its query.
    """

    key_distance: Tensor | None = None
    """Key distance of the last batch in training mode, see :meth:`TaskPrompts.distance`."""

    general: nn.Parameter
    """General prefixes, ``(n_layers, 2, length, n_heads, head_dim)``."""

    experts: TaskPrompts
    general_layers: tuple[int, ...]
    expert_layers: tuple[int, ...]

    def prefixes(self, queries: Tensor) -> dict[int, Tensor]:
        """Returns the prefix of every layer that has one, ``(batch or 1, 2, length, ...)``.

        :param queries: ``(batch, dim)``.
        """
        if self.training:
            self.key_distance = self.experts.distance(queries)
            experts = self.experts.current()[None]  # (1, n_layers, 2, length, n_heads, head_dim)
        else:
            experts = self.experts.stacked()[self.experts.match(queries)]  # (batch, ...)
        prefixes = dict(zip(self.general_layers, self.general[:, None], strict=True))
        prefixes.update(zip(self.expert_layers, experts.unbind(1), strict=True))
        return prefixes
