"""Stores finished adapters in the bank and their signatures in the tree (TreeLoRA, Section 3.1)."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, SignatureSketch
from treelora_avalanche.experiences import is_part
from treelora_avalanche.plugins.task_parts import TaskParts
from treelora_avalanche.state import check_keys, clone_state
from treelora_avalanche.tree import AdapterTree


class TreeBuilderPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Stores the adapter after every experience, and inserts its signature into the tree.

    The signature of a task is the direction in which training moved the adapter. Where the tree
    merges adapters to stay within its budget, the bank merges the same ones. Works with any
    strategy whose model carries LoRA, and does not affect training. Task labels are not used.

    In an online stream (``split_online_stream``) the parts of a task are one task: each part
    replaces the adapter and the signature that the part before has stored, and the signature is the
    direction from the start of the first part. While a part is trained, tree and bank hold the
    tasks before, as in the training of a whole task. Costs a copy of the bank per part.

    Example::

        tree, bank = AdapterTree(), AdapterBank()
        strategy = SeqLoRA(model, plugins=[TreeBuilderPlugin(tree, bank)])

    :param tree: the tree of task signatures, shared with the other plugins.
    :param bank: the bank of finished adapters, shared with the other plugins.
    """

    def __init__(self, tree: AdapterTree, bank: AdapterBank):
        super().__init__()
        self.tree = tree
        self.bank = bank
        self._parts = TaskParts()
        self._past: dict[str, Any] | None = None
        """Tree and bank before the task of the last part, and the sketch where it started."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records where the adapter starts; withdraws the task if this is a further part of it."""
        self._factors = LoRAFactors(strategy.model)
        device = self._factors.stack.device
        self._sketch = SignatureSketch(self._factors.shapes, device=device)
        if self._past is not None and self._parts.continues(strategy.experience):
            self.tree.load_state_dict(clone_state(self._past["tree"]))
            self.bank.load_state_dict(self._past["bank"])
            self._start = self._past["start"].to(device)
        else:
            self._start = self._sketch(self._factors.stack)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stores the adapter in the bank and its signature in the tree."""
        signature = self._sketch.direction(self._factors.stack, self._start)
        self._past = self._before_task() if is_part(strategy.experience) else None
        self._parts.finish(strategy.experience)
        self.bank.append(self._factors)
        for merge in self.tree.insert(signature):
            self.bank.merge(*merge)

    def _before_task(self) -> dict[str, Any]:
        # The bank is copied, because a merge writes into its adapters.
        bank = clone_state(self.bank.state_dict())
        return {"tree": self.tree.state_dict(), "bank": bank, "start": self._start}

    def state_dict(self) -> dict[str, Any]:
        """Returns the tree and the bank; after a part of a task, those before that task too."""
        return {
            "tree": self.tree.state_dict(),
            "bank": self.bank.state_dict(),
            "task": self._parts.task,
            "past": self._past,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the tree and the bank into the objects that the plugins share.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; the tree and the bank are then unchanged.
        """
        check_keys(state, {"tree", "bank", "task", "past"}, "the state of TreeBuilderPlugin")
        # Read into a new object first, so that neither changes if the other is refused.
        bank = AdapterBank()
        bank.load_state_dict(state["bank"])
        n_adapters = len(state["tree"].get("tasks", ()))
        if len(bank) != n_adapters:
            raise ValueError(
                f"the bank should have {n_adapters} adapters, as the tree of the state, but has "
                f"{len(bank)}. Use another copy of the state."
            )
        self.tree.load_state_dict(state["tree"])
        self.bank.load_state_dict(state["bank"])
        self._parts.task, self._past = state["task"], clone_state(state["past"])
