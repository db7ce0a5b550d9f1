"""TreeLoRA (Qian et al., ICML 2025, arXiv 2506.10355) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from treelora_avalanche.adapters import (
    AdapterBank,
    TrainableView,
    find_adaptable_layers,
    lora_layers,
)
from treelora_avalanche.choices import INFERENCE, SELECTIONS, check_known
from treelora_avalanche.defaults import LAST_TREE_LAMBDA, TREE_LAMBDA
from treelora_avalanche.models.views.routed_vit import RoutedAdapters
from treelora_avalanche.plugins import (
    LCBSelectorPlugin,
    MergedAdapterPlugin,
    NearestSelectorPlugin,
    RandomSelectorPlugin,
    RouterPlugin,
    SelectorPlugin,
    SparseUpdatePlugin,
    TaskAdaptiveHeadPlugin,
    TaskStartPlugin,
    TreeBuilderPlugin,
)
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA
from treelora_avalanche.tree import AdapterTree

SELECTORS: dict[str, type[SelectorPlugin]] = dict(
    zip(
        SELECTIONS,
        (LCBSelectorPlugin, NearestSelectorPlugin, RandomSelectorPlugin),
        strict=True,
    )
)


@positional_model
class TreeLoRAStrategy(SeqLoRA):
    """TreeLoRA: one LoRA adapter, pulled in every layer towards that of the most similar past task.

    Finished tasks are filed in a K-D tree by the direction in which they moved the adapter. During
    training a bandit search on that tree (lower confidence bounds) looks at one past task per layer
    and step, and a sparse update keeps the adapter close, in most coordinates exactly, to the one
    it picks. With ``tree_lambda=0`` and ``inference="last"`` this is :class:`SeqLoRA`, bit for bit.
    Stores per task, on the host, one adapter, and per adapted matrix a signature of 256 numbers;
    two nodes of the tree, of 256 numbers each; with ``inference="routed"`` class statistics. On the
    device lies one adapter's worth of picked factors. Task labels are unused.

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param tree_lambda: strength lambda of the pull (Eq. 3). The paper's is 0.1 for ViTs and 0.5 for
        language models. By default 0.5 where the adapter of the last task answers, and 0.1 where
        the past is kept by other means, see ``inference`` (docs/results.md).
    :param selection: ``"lcb"``, the paper's search; ``"nearest"``, the exact nearest by distance to
        all stored signatures; ``"random"``, the control.
    :param depth: levels of the tree; by default the number of adapted matrices, at most 64.
    :param max_adapters: storage budget: beyond it the two closest adapters are merged into one.
        None keeps all.
    :param seed: seed of the selection.
    :param inference: which adapter answers. ``"merged"``: the mean of all tasks' adapters, that of
        the tree's root, where the next task starts too (:class:`~treelora_avalanche.plugins.
        MergedAdapterPlugin`); ``"last"``: that of the last task, as in the paper; ``"routed"``: for
        each sample that of the task which the frozen backbone takes it for; a task then starts at
        the adapter of the past one that looks most like it (:class:`~treelora_avalanche.plugins.
        TaskStartPlugin`). Merging and routing need a head that is fitted to what answers,
        ``head="task_adaptive"``: with it the default is ``"merged"``, else ``"last"``
        (docs/does_the_tree_matter.md).
    :param plugins: further plugins, which run between filing a finished task and the selection; the
        list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range; the model is then as it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        tree_lambda: float | None = None,
        selection: str = "lcb",
        depth: int | None = None,
        max_adapters: int | None = None,
        seed: int = 0,
        inference: str | None = None,
        head: str = "linear",
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        check_known("`selection`", selection, SELECTIONS)
        if inference is None:
            inference = "merged" if _fits_head(head, plugins) else "last"
        check_known("`inference`", inference, INFERENCE)
        if tree_lambda is None:
            tree_lambda = LAST_TREE_LAMBDA if inference == "last" else TREE_LAMBDA
        if depth is not None:
            n_layers = len(lora_layers(model)) or len(
                find_adaptable_layers(model, kwargs.get("layers"), kwargs.get("target_modules"))
            )
            if depth > n_layers:
                raise ValueError(
                    f"`depth` is {depth}, and only {n_layers} matrices are adapted, one per level; "
                    "lower it, or adapt more layers."
                )
        self.tree = AdapterTree(depth, max_adapters=max_adapters)
        self.bank = AdapterBank()
        options = {} if selection == "nearest" else {"seed": seed}
        self.selector = SELECTORS[selection](self.tree, **options)
        regularizer = SparseUpdatePlugin(self.selector, self.bank, tree_lambda)
        filing: list[SupervisedPlugin] = [TreeBuilderPlugin(self.tree, self.bank)]
        selection_plugins: list[SupervisedPlugin] = [self.selector, regularizer]
        self.inference = inference
        if inference == "merged":
            # Before the head, which is fitted to the merged adapter.
            filing.append(MergedAdapterPlugin())
        elif inference == "routed":
            filing.append(TaskStartPlugin(self.tree, self.bank, seed=seed))
            selection_plugins.append(RouterPlugin(self.tree, seed))
        plugins = [*filing, *(plugins or ()), *selection_plugins]
        super().__init__(model=model, head=head, plugins=plugins, **kwargs)

    def _view(self, model: nn.Module) -> TrainableView:
        return (
            RoutedAdapters(model, self.bank) if self.inference == "routed" else super()._view(model)
        )


def _fits_head(head: str, plugins: Sequence[SupervisedPlugin] | None) -> bool:
    """Whether the head is fitted after every task to the adapter that answers."""
    return head == "task_adaptive" or any(
        isinstance(plugin, TaskAdaptiveHeadPlugin) for plugin in plugins or ()
    )
