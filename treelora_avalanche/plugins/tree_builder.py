"""Stores finished adapters in the bank and their signatures in the tree (TreeLoRA, Section 3.1)."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, SignatureSketch
from treelora_avalanche.state import check_keys
from treelora_avalanche.tree import AdapterTree


class TreeBuilderPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Stores the adapter after every experience, and inserts its signature into the tree.

    The signature of a task is the direction in which training moved the adapter. Where the tree
    merges adapters to stay within its budget, the bank merges the same ones. Works with any
    strategy whose model carries LoRA, and does not affect training. Task labels are not used.
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

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Records where the adapter starts."""
        self._factors = LoRAFactors(strategy.model)
        self._sketch = SignatureSketch(self._factors.shapes, device=self._factors.stack.device)
        self._start = self._sketch(self._factors.stack)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stores the adapter in the bank and its signature in the tree."""
        signature = self._sketch.direction(self._factors.stack, self._start)
        self.bank.append(self._factors)
        for merge in self.tree.insert(signature):
            self.bank.merge(*merge)

    def state_dict(self) -> dict[str, Any]:
        """Returns the tree and the bank."""
        return {"tree": self.tree.state_dict(), "bank": self.bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the tree and the bank into the objects that the plugins share.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; the tree and the bank are then unchanged.
        """
        check_keys(state, {"tree", "bank"}, "the state of TreeBuilderPlugin")
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
