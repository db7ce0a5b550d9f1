"""Prompts, their keys, and how a query picks among them; independent of the backbone.

L2P (Wang et al., CVPR 2022) has one pool that all tasks share; DualPrompt (Wang et al., ECCV 2022)
and HiDe-Prompt (Wang et al., NeurIPS 2023) have one prompt per task. The vision transformers that
carry them are in ``models/prompted_vit.py``, the language models in ``models/prompted_language.py``
and ``models/prefixed_language.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.state import check_keys


def cosine_similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosine between every query and every key.

    :param queries: ``(batch, dim)``.
    :param keys: ``(n_keys, dim)``.
    :return: ``(batch, n_keys)``.
    """
    return F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T


def check_momentum(momentum: float) -> None:
    """Raises an error for a weight of the past that leaves nothing to the live prompt.

    :param momentum: the weight.
    :raises ValueError: if it is not at least 0 and below 1.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be at least 0 and below 1, and is {momentum}.")


def check_length(name: str, length: int) -> None:
    """Raises an error for a prompt without positions.

    :param name: of the argument.
    :param length: positions of a prompt.
    :raises ValueError: if it is below 1.
    """
    if length < 1:
        raise ValueError(f"`{name}` must be at least 1, and is {length}.")


def check_layers(name: str, layers: Sequence[int], n_layers: int) -> None:
    """Raises an error if block numbers are not those of a transformer.

    :param name: of the argument.
    :param layers: the block numbers.
    :param n_layers: how many blocks the transformer has.
    :raises ValueError: if there are none, one is out of range, or one comes twice.
    """
    known = range(n_layers)
    if not layers or len(set(layers)) < len(layers) or any(layer not in known for layer in layers):
        raise ValueError(
            f"`{name}` is {list(layers)}; it must name different blocks of the model, which are 0 "
            f"to {n_layers - 1}."
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
    :param n_layers: how many blocks the transformer has.
    :raises ValueError: if one is out of range, or a block is to take both kinds.
    """
    check_length("general_length", general_length)
    check_length("expert_length", expert_length)
    check_layers("general_layers", general_layers, n_layers)
    check_layers("expert_layers", expert_layers, n_layers)
    if set(general_layers) & set(expert_layers):
        raise ValueError(
            f"`general_layers` {list(general_layers)} and `expert_layers` {list(expert_layers)} "
            "share blocks; a block takes one kind of prompt."
        )


class PromptPool(nn.Module):
    """A pool of prompts of which every sample takes those whose keys are nearest to its query.

    Each sample picks for itself: its prompts do not depend on the other samples
    of the batch.

    :param pool_size: number of prompts.
    :param length: tokens per prompt.
    :param top_k: prompts per sample.
    :param dim: width of tokens and queries.
    :raises ValueError: if a number is below 1, or ``top_k`` above ``pool_size``.
    """

    def __init__(self, *, pool_size: int, length: int, top_k: int, dim: int):
        super().__init__()
        for name, value in (("pool_size", pool_size), ("prompt_length", length), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, and is {value}.")
        if top_k > pool_size:
            raise ValueError(
                f"`top_k` is {top_k}, and the pool has {pool_size} prompts; lower it, or raise "
                "`pool_size`."
            )
        self.top_k = top_k
        self.prompts = nn.Parameter(torch.empty(pool_size, length, dim).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(pool_size, dim).uniform_(-1, 1))

    def pick(self, queries: Tensor) -> Tensor:
        """Indices of the prompts of every sample, ``(batch, top_k)``, the nearest first.

        :param queries: ``(batch, dim)``.
        """
        return cosine_similarity(queries, self.keys).topk(self.top_k, dim=1).indices

    def take(self, picks: Tensor) -> Tensor:
        """The picked prompts one after the other, ``(batch, top_k * length, dim)``.

        :param picks: what :meth:`pick` returned.
        """
        return self.prompts[picks].flatten(1, 2)

    def distance(self, queries: Tensor, picks: Tensor) -> Tensor:
        """Mean over the samples of sum_k (1 - cos(query, key_k)) over the picked keys (Eq. 5).

        :param queries: ``(batch, dim)``.
        :param picks: what :meth:`pick` returned.
        :return: a scalar that leads a gradient to the picked keys.
        """
        similarity = cosine_similarity(queries, self.keys).gather(1, picks)
        return (1 - similarity).sum(1).mean()


class TaskPrompts(nn.Module):
    """One prompt for every task, and, if wanted, one key: the last are trained, the others frozen.

    A new task starts from the prompt of the one before, and from a random key. The past is held as
    buffers that are not part of ``state_dict``: parameters and optimizer know the live prompt
    alone, so no momentum moves a past one, and there is no pool whose size limits the number of
    tasks.

    With ``momentum`` above 0 the prompt in use is an ensemble with the past ones (HiDe-Prompt):
    ``(1 - momentum) * live + momentum * mean(past)``.

    :param shape: shape of a prompt.
    :param key_dim: width of the keys; None for prompts without keys.
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
        self.live = nn.Parameter(torch.empty(*shape).uniform_(-1, 1))
        self.key: nn.Parameter | None = None
        if key_dim is not None:
            self.key = nn.Parameter(torch.empty(key_dim).uniform_(-1, 1))
        self.register_buffer("past", torch.empty(0, *shape), persistent=False)
        self.register_buffer("past_mean", torch.zeros(*shape), persistent=False)
        self.register_buffer("past_keys", torch.empty(0, key_dim or 0), persistent=False)

    def __len__(self) -> int:
        """Number of tasks, the live one included."""
        return len(self.past) + 1

    def current(self) -> Tensor:
        """The prompt of the live task, of the given shape."""
        if self.momentum == 0 or len(self.past) == 0:
            return self.live
        return torch.lerp(self.live, self.past_mean, self.momentum)

    def stacked(self) -> Tensor:
        """The prompts of all tasks, ``(n_tasks, *shape)``, the live one last."""
        return torch.cat((self.past, self.current()[None]))

    def match(self, queries: Tensor) -> Tensor:
        """The task whose key is nearest to each query by cosine, ``(batch,)``.

        :param queries: ``(batch, dim)``.
        :raises ValueError: if the prompts have no keys.
        """
        keys = torch.cat((self.past_keys, self._key()[None]))
        return cosine_similarity(queries, keys).argmax(1)

    def distance(self, queries: Tensor) -> Tensor:
        """Mean over the samples of 1 - cos(query, key of the live task), a scalar.

        :param queries: ``(batch, dim)``.
        :raises ValueError: if the prompts have no keys.
        """
        return (1 - cosine_similarity(queries, self._key()[None])).mean()

    def _key(self) -> nn.Parameter:
        if self.key is None:
            raise ValueError("these prompts were made without keys; give `key_dim`.")
        return self.key

    @torch.no_grad()
    def fold(self) -> None:
        """Freeze the live prompt and key as those of a past task, and start those of a new one.

        The new prompt is the old one to begin with; the new key is random: one that started where
        the last has ended would have been pulled for two tasks, and be the nearest to everything.
        """
        prompt = self.current().detach().clone()
        self._set_past(torch.cat((self.past, prompt[None])))
        self.live.copy_(prompt)
        if self.key is not None:
            self.past_keys = torch.cat((self.past_keys, self.key.detach()[None]))
            self.key.uniform_(-1, 1)

    def _set_past(self, past: Tensor) -> None:
        self.past = past
        if len(past):
            self.past_mean = past.mean(0)

    def past_state(self) -> dict[str, Any]:
        """Prompts and keys of the past tasks, not copied; the live ones are parameters."""
        return {"prompts": self.past, "keys": self.past_keys}

    def load_past(self, state: dict[str, Any]) -> None:
        """Take the past of a state in place of the present one.

        :param state: what :meth:`past_state` returned.
        :raises ValueError: if it is of other shapes; the past is then as it was.
        """
        check_keys(state, {"prompts", "keys"}, "the state of TaskPrompts")
        prompts, keys = state["prompts"], state["keys"]
        n_keys = len(prompts) if self.key is not None else 0
        fits = prompts.shape[1:] == self.live.shape and keys.shape == (
            n_keys,
            self.past_keys.shape[1],
        )
        if not fits:
            raise ValueError(
                f"past prompts {tuple(prompts.shape)} with keys {tuple(keys.shape)} do not fit "
                f"prompts of {tuple(self.live.shape)}; build the strategy with the same lengths "
                "and layers."
            )
        self.past_keys = keys.detach().to(self.live, copy=True)
        self._set_past(prompts.detach().to(self.live, copy=True))
