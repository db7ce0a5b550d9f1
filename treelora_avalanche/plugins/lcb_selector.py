"""Selects, at every step and for every layer, the past task nearest to the current one.

The current task is represented by its running signature: the direction in which training has moved
the adapter so far. :class:`LCBSelectorPlugin` compares it with one past task per layer and step
(TreeLoRA, Section 3.2), :class:`NearestSelectorPlugin` with all of them, which stored signatures
make cheap, and :class:`RandomSelectorPlugin` with none, as a control.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import LoRAFactors, SignatureSketch
from treelora_avalanche.bandit import LCBSearch
from treelora_avalanche.experiences import n_parts
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, clone_state
from treelora_avalanche.tree import AdapterTree


class SelectorPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Base class of the selectors: keeps the running signature and the picks.

    A subclass implements ``_start_search``, ``_select`` and, to learn from the signature,
    ``_observe``. In an online stream a search lasts for all parts of a task; to continue it in
    another process, a subclass implements ``_search_state`` and ``_load_search``. Example::

        class FirstSelectorPlugin(SelectorPlugin):
            def _start_search(self, strategy):
                self._first = torch.zeros(self._signatures.shape[1], dtype=torch.long)

            def _select(self):
                return self._first

    :param tree: the tree of task signatures, shared with the other plugins.
    """

    def __init__(self, tree: AdapterTree):
        super().__init__()
        self.tree = tree
        self.picks: Tensor | None = None
        """Index of the picked adapter of every layer, ``(n_layers,)``; None in the first task."""
        self._parts = TaskParts()
        self._kept: dict[str, Any] | None = None
        """Start and search of a task that was saved between two of its parts."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records where the adapter starts, and moves the stored signatures to the device."""
        self.picks = None
        if len(self.tree):
            self._factors = LoRAFactors(strategy.model)
            device = self._factors.stack.device
            self._sketch = SignatureSketch(self._factors.shapes, device=device)
            self._signatures = self.tree.signatures.to(device)  # (n_adapters, n_layers, size)
            if not self._parts.continues(strategy.experience):
                self._start = self._sketch(self._factors.stack)
                self._start_search(strategy)
            elif self._kept is not None:
                self._start = self._kept["start"].to(device)
                self._start_search(strategy)
                self._load_search(self._kept["search"])
        self._kept = None

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Picks an adapter for every layer."""
        if len(self.tree):
            self.picks = self._select()

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Passes the running signature to the selector."""
        if self.picks is not None:
            self._observe(self._sketch.direction(self._factors.stack, self._start))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records the task, to recognise its further parts."""
        self._parts.finish(strategy.experience)

    def state_dict(self) -> dict[str, Any]:
        """Returns the last picks and the seed; after a part of a task, its search too."""
        kept = self._kept
        if kept is None and self._parts.task is not None and self.picks is not None:
            kept = {"start": self._start, "search": self._search_state()}
        return {
            "seed": getattr(self, "seed", None),
            "picks": self.picks,
            "task": self._parts.task,
            "kept": kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the last picks; the seed must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if the seed differs; the selector is then unchanged.
        """
        where = f"the state of {type(self).__name__}"
        check_keys(state, {"seed", "picks", "task", "kept"}, where)
        seed = getattr(self, "seed", None)
        if state["seed"] != seed:
            raise ValueError(
                f"`seed` of {type(self).__name__} should be {state['seed']}, as in the state, but "
                f"is {seed}. Build it with seed={state['seed']} to continue."
            )
        self.picks = None if state["picks"] is None else state["picks"].clone()
        self._parts.task, self._kept = state["task"], clone_state(state["kept"])

    def _start_search(self, strategy: Any) -> None:
        raise NotImplementedError

    def _select(self) -> Tensor:
        raise NotImplementedError

    def _observe(self, signature: Tensor) -> None:
        """Updates the selector with the running signature, ``(n_layers, size)``."""

    def _search_state(self) -> dict[str, Any]:
        """Returns the search as tensors and plain values."""
        return {}

    def _load_search(self, state: dict[str, Any]) -> None:
        """Continues the search from a state."""


class LCBSelectorPlugin(SelectorPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Picks by lower confidence bound on the tree: one past task per layer and step (Eq. 2).

    A new search starts with every task; its horizon is the number of steps of that task. Works with
    any strategy whose model carries LoRA. Task labels are not used. Example::

        tree, bank = AdapterTree(), AdapterBank()
        selector = LCBSelectorPlugin(tree)
        plugins = [TreeBuilderPlugin(tree, bank), selector, SparseUpdatePlugin(selector, bank)]

    :param tree: the tree of task signatures, shared with the other plugins.
    :param seed: seed of the order among unvisited tasks.
    """

    def __init__(self, tree: AdapterTree, seed: int = 0):
        super().__init__(tree)
        self.seed = seed

    search: LCBSearch
    """Search of the current experience; unset in the first."""

    def _start_search(self, strategy: Any) -> None:
        n_layers = self._signatures.shape[1]
        n_steps = strategy.train_epochs * len(strategy.dataloader)
        self.search = LCBSearch(
            self.tree.flatten(),
            n_layers,
            horizon=n_steps * n_parts(strategy.experience),
            seed=self.seed + strategy.clock.train_exp_counter,
            device=self._signatures.device,
        )
        self._layers = torch.arange(n_layers, device=self._signatures.device)

    def _select(self) -> Tensor:
        return self.search.select()

    def _observe(self, signature: Tensor) -> None:
        picked = self._signatures[self.picks, self._layers]  # (n_layers, size)
        self.search.update((signature - picked).abs().sum(-1))

    def _search_state(self) -> dict[str, Any]:
        return self.search.state_dict()

    def _load_search(self, state: dict[str, Any]) -> None:
        self.search.load_state_dict(state)


class NearestSelectorPlugin(SelectorPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Picks the exact nearest past task, ``argmin_k ‖g − g_k‖_1``, over every stored signature.

    Measures what the bandit gives up. A step costs O(n_tasks), with a small constant: one sketch
    per task and layer. Example::

        selector = NearestSelectorPlugin(tree)

    :param tree: the tree of task signatures, shared with the other plugins.
    """

    def _start_search(self, strategy: Any) -> None:
        self._nearest = self._signatures.new_zeros(self._signatures.shape[1], dtype=torch.long)

    def _select(self) -> Tensor:
        return self._nearest

    def _observe(self, signature: Tensor) -> None:
        self._nearest = (self._signatures - signature).abs().sum(-1).argmin(0)

    def _search_state(self) -> dict[str, Any]:
        return {"nearest": self._nearest}

    def _load_search(self, state: dict[str, Any]) -> None:
        self._nearest = state["nearest"].to(self._nearest)


class RandomSelectorPlugin(SelectorPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Picks uniformly at random: the control for every selection. Example::

        selector = RandomSelectorPlugin(tree, seed=0)

    :param tree: the tree of task signatures, shared with the other plugins.
    :param seed: seed of the picks.
    """

    def __init__(self, tree: AdapterTree, seed: int = 0):
        super().__init__(tree)
        self.seed = seed

    def _start_search(self, strategy: Any) -> None:
        device = self._signatures.device
        self._generator = torch.Generator(device)
        self._generator.manual_seed(self.seed + strategy.clock.train_exp_counter)

    def _select(self) -> Tensor:
        n_adapters, n_layers, _ = self._signatures.shape
        return torch.randint(
            n_adapters, (n_layers,), generator=self._generator, device=self._signatures.device
        )

    def _search_state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def _load_search(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())
