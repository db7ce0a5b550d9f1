"""The search for the most similar past task: lower confidence bounds on a tree.

Eq. 2 of `TreeLoRA <https://arxiv.org/abs/2506.10355>`_ (Qian et al., ICML 2025), after the bandits
on smooth trees of Coquelin & Munos (2007). Every past task is an arm, and a pull of arm k at a step
of training shows the noisy distance ξ between the current task and task k. The bound of a node says
how near its tasks may be, in all optimism; the search goes from the root to the child of the
smallest bound until it meets an arm, and pulls it. With n pulls through a node, their mean μ, and
a horizon of T steps, its bound B is

* ``μ − c σ sqrt(log T / n)`` for an arm,
* ``max(min over the children of B, μ − c σ sqrt(log T / n) − δ)`` for an inner node,
* below all others for a node that was never visited.

Our reading where the paper is open, or where we depart from it:

* σ, the standard deviation of ξ within arms, is estimated on the way. The paper's bonus has no
  σ, so it drowns distances of any other scale than its own.
* Until σ has 5 degrees of freedom, the first arm is pulled again. A bound set with too small a σ
  stays too high, and its branch is lost, as a pull brings only its own path up to date.
* δ is the tree's. A smaller one is faster on clean hierarchies, and loses the way on weak ones.
* The horizon T stands in place of the current step t, so that time alone changes no bound, and
  a step touches only the path it went.
* The paper prints the bound of an inner node as ``max over {min over children of (B − δ)}``, of
  one term; the second term is from Coquelin & Munos.

Regret, and the share of runs that find the nearest task, in ``benchmarks/bandit_regret.py`` (noise
0.1, 2,000 steps, mean of 32 runs; with 512 tasks choosing blindly costs 1,396):

=======================================  ==========  ============
search                                   512 tasks   4,096 tasks
=======================================  ==========  ============
as it is                                  37, 100%      60,  97%
without the tree                         474, 100%   1,426,   3%
σ = 1                                    483, 100%     546,  50%
first arm pulled twice, then on with σ    52,  91%      64,  94%
at once on with σ = 0 until it is known  198,  38%     187,  31%
δ = 0                                     22, 100%      40, 100%
=======================================  ==========  ============
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from treelora_avalanche.tree import FlatTree

SIGMA_FLOOR = 1e-6
"""The least σ, for observations without noise."""

SIGMA_FREEDOM = 5
"""Degrees of freedom at which σ counts as known: the first arm is pulled once more than that."""

_UNKNOWN_SIGMA = 1e9
"""In place of σ while it is unknown; puts the bound of the first path below the unvisited."""

_UNVISITED = -1e6
"""Bound of a node never visited, far below any distance."""


def lower_confidence_bound(
    mean: Tensor, count: Tensor, sigma: Tensor, horizon: int, c: float = 2.0
) -> Tensor:
    """How small the expectation behind ``count`` observations may well be (Eq. 2).

    :param mean: mean of the observations, any shape.
    :param count: their number, at least 1; broadcast against ``mean``.
    :param sigma: standard deviation of one observation; broadcast against ``mean``.
    :param horizon: number of steps T of the whole search.
    :param c: width of the confidence interval; the paper's is 2.
    :return: ``mean − c sigma sqrt(log(horizon) / count)``.
    """
    return mean - c * math.sqrt(math.log(horizon)) * sigma * count.rsqrt()


def pooled_sigma(squares: Tensor, freedom: Tensor) -> Tensor:
    """Standard deviation within arms, from all arms together.

    :param squares: sum over arms of the squared deviations from the arm's mean.
    :param freedom: sum over arms of the number of observations less one.
    :return: ``sqrt(squares / freedom)``, and at least the floor; the floor before any arm has been
        pulled twice.
    """
    return (squares / freedom.clamp(min=1)).sqrt().clamp(min=SIGMA_FLOOR)


class LCBSearch:
    """Lower-confidence-bound search for all layers at once, over one shared tree.

    A step is O(height) whatever the number of arms, waits for no device, and writes into tensors
    of fixed shape, so it can be captured in a CUDA graph.

    >>> tree = FlatTree(torch.tensor([[0, 0], [1, 1], [0, 1]]), torch.zeros(3), root=2, height=1)
    >>> search = LCBSearch(tree, n_layers=1, horizon=100)
    >>> for _ in range(20):
    ...     arms = search.select()  # (n_layers,)
    ...     search.update(torch.tensor([0.9, 0.1])[arms])  # the distance to arm 1 is the smaller
    >>> search.best()
    tensor([1])

    :param tree: the tree of past tasks.
    :param n_layers: number of layers, each of which searches on its own.
    :param horizon: number of steps T of the current task.
    :param c: width of the confidence interval; the paper's is 2.
    :param seed: decides between nodes never visited.
    :param device: where the statistics live and the search runs.
    :raises ValueError: if ``n_layers`` or ``horizon`` is below 1.
    """

    means: Tensor
    """``(n_layers, n_nodes)``: mean distance observed through each node; 0 if never visited."""

    counts: Tensor
    """``(n_layers, n_nodes)``: number of pulls through each node, as floating point."""

    bounds: Tensor
    """``(n_layers, n_nodes)``: B of each node. Below −1e6 where never visited, in random order."""

    delta: Tensor
    """``(n_layers, n_nodes)``: δ of each node, to be rescaled if the distances are."""

    def __init__(
        self,
        tree: FlatTree,
        n_layers: int,
        horizon: int,
        *,
        c: float = 2.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("n_layers", n_layers), ("horizon", horizon)):
            if value < 1:
                raise ValueError(
                    f"`{name}` should be at least 1 but the value passed is {value}. "
                    + {
                        "n_layers": "Pass the number of adapted layers.",
                        "horizon": "Pass the number of training steps of the task.",
                    }[name]
                )
        self.horizon = horizon
        self.c = c
        n_nodes = len(tree.children)
        shape = (n_layers, n_nodes)
        # Drawn on the CPU, so that a seed means the same on every device.
        priority = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        nodes = torch.arange(n_nodes)
        left, right = tree.children.unbind(1)
        best_child = torch.where(priority[:, left] >= priority[:, right], left, right)
        self.n_arms = int((left == nodes).sum())
        left, right = tree.children[self.n_arms :].unbind(1)
        sibling = nodes.clone()
        sibling[left], sibling[right] = right, left

        self.means = torch.zeros(shape, device=device)
        self.counts = torch.zeros(shape, device=device)
        self.bounds = ((1 + priority) * _UNVISITED).to(device)
        self.delta = tree.delta.to(device).repeat(n_layers, 1)
        self._children = tree.children.to(device)
        self._sibling = sibling.to(device)
        self._best_child = best_child.to(device)  # of the smallest bound; an arm's is itself
        self._squares = torch.zeros(n_layers, 1, device=device)
        self._freedom = torch.zeros(n_layers, 1, device=device)
        # The way of the last `select`, from the root. An arm met early is repeated to the end.
        self._path = torch.full((n_layers, tree.height + 1), tree.root, device=device)
        self._selected = False

    _STATISTICS = (
        "means", "counts", "bounds", "delta", "_best_child", "_squares", "_freedom", "_path",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The search as tensors (not copied) and plain values."""
        return {
            "horizon": self.horizon,
            "c": self.c,
            "selected": self._selected,
            "children": self._children,
            **{name.removeprefix("_"): getattr(self, name) for name in self._STATISTICS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a search at the step where :meth:`state_dict` left it.

        The tensors are written in place, so a captured graph of this search stays valid.

        :param state: what :meth:`state_dict` returned, of a search on an equal tree.
        :raises ValueError: if the keys or shapes differ, or the tree does. The search is then as it
            was.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(
                f"`state` should have the keys {sorted(own)} but its keys are {sorted(state)}."
            )
        for name, tensor in own.items():
            if isinstance(tensor, Tensor) and state[name].shape != tensor.shape:
                raise ValueError(
                    f'`state["{name}"]` should have the shape {tuple(tensor.shape)} but its shape '
                    f"is {tuple(state[name].shape)}. Use the tree and the layers of that search."
                )
        if not torch.equal(state["children"].to(self._children.device), self._children):
            raise ValueError("`state` is of a search on another tree. Use the tree of that search.")
        self.horizon = state["horizon"]
        self.c = state["c"]
        self._selected = state["selected"]
        for name in self._STATISTICS:
            getattr(self, name).copy_(state[name.removeprefix("_")])

    @property
    def sigma(self) -> Tensor:
        """``(n_layers,)``: σ, the standard deviation of the distances within arms so far."""
        return pooled_sigma(self._squares, self._freedom).squeeze(1)

    def select(self) -> Tensor:
        """Follows the smallest bound from the root down to an arm.

        :return: ``(n_layers,)``, long: the arm to pull for each layer.
        """
        way = [self._path[:, :1]]  # the root
        for _ in range(self._path.shape[1] - 1):
            way.append(self._best_child.gather(1, way[-1]))
        self._path.copy_(torch.cat(way, 1))
        self._selected = True
        return way[-1].squeeze(1).clone()

    @torch.no_grad()
    def update(self, distances: Tensor) -> None:
        """Takes in what the pull has shown, along the path of the last :meth:`select` only.

        Where the path has met its arm before the end, the arm stands there several times. That is
        harmless: all that is written is computed from what stood before, so it is the same.

        :param distances: ``(n_layers,)``: the distance ξ observed for each selected arm.
        :raises RuntimeError: if nothing has been selected since the last update.
        :raises ValueError: if there is not one distance per layer.
        """
        if not self._selected:
            raise RuntimeError("`update` needs arms to go with it. Call `select` first.")
        path = self._path  # (n_layers, height + 1)
        if distances.shape != path.shape[:1]:
            raise ValueError(
                f"`distances` should have the shape ({len(path)},), one for each layer, but the "
                f"shape passed is {tuple(distances.shape)}."
            )
        self._selected = False

        before = self.means.gather(1, path)
        count = self.counts.gather(1, path) + 1
        deviation = distances.to(before.dtype)[:, None] - before
        mean = before + deviation / count
        self.means.scatter_(1, path, mean)
        self.counts.scatter_(1, path, count)

        # Welford: the arm's squared deviations grow by the distances to its old and new mean.
        arm_count = count[:, -1:]
        self._squares += deviation[:, -1:].square() * (1 - 1 / arm_count)
        self._freedom += (arm_count > 1).to(arm_count.dtype)
        sigma = torch.where(
            self._freedom < SIGMA_FREEDOM,
            _UNKNOWN_SIGMA,
            pooled_sigma(self._squares, self._freedom),
        )

        own = lower_confidence_bound(mean, count, sigma, self.horizon, self.c)
        own = own - self.delta.gather(1, path)  # δ of an arm is 0
        # B on the way back from the arm to the root. Nothing has changed beside the path.
        child = path[:, 1:]
        sibling = self._sibling[child]
        beside = self.bounds.gather(1, sibling)
        beside.masked_fill_(child == path[:, :-1], math.inf)  # the arm's repetitions
        # max(min(x, beside), own) is x clamped between own and max(beside, own).
        ceiling = torch.maximum(beside, own[:, :-1])
        bounds = list(own.unbind(1))
        for level in range(path.shape[1] - 2, -1, -1):
            bounds[level] = torch.clamp(bounds[level + 1], own[:, level], ceiling[:, level])
        bound = torch.stack(bounds, 1)
        self.bounds.scatter_(1, path, bound)
        self._best_child.scatter_(
            1, path[:, :-1], torch.where(bound[:, 1:] <= beside, child, sibling)
        )

    def best(self) -> Tensor:
        """The arm that is the nearest beyond doubt: that of the smallest *upper* bound.

        The arm of the smallest mean is often one that was pulled once, with luck. With 512 tasks
        and noise 0.3, it was the true nearest in 12% of 32 runs, and this one in 97%.

        :return: ``(n_layers,)``, long; arm 0 before the first update.
        """
        arms = slice(self.n_arms)
        upper = lower_confidence_bound(
            self.means[:, arms], self.counts[:, arms], self.sigma[:, None], self.horizon, -self.c
        )
        return torch.where(self.counts[:, arms] > 0, upper, math.inf).argmin(1)
