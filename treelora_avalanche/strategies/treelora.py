"""TreeLoRA (Qian et al., ICML 2025, arXiv 2506.10355)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import (
    AdapterBank,
    AdapterHost,
    TrainableView,
    find_adaptable_layers,
    find_host,
    lora_layers,
)
from treelora_avalanche.choices import INFERENCE, SELECTIONS, check_known
from treelora_avalanche.defaults import (
    LAST_TREE_LAMBDA,
    ROUTED_LANGUAGE_TREE_LAMBDA,
    TREE_LAMBDA,
)
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.views.prompt_router import Route
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel
from treelora_avalanche.models.views.routed_vit import RoutedAdapters
from treelora_avalanche.models.views.split_language import supports_split
from treelora_avalanche.plugins import (
    LCBSelectorPlugin,
    MergedAdapterPlugin,
    NearestSelectorPlugin,
    PromptRouterPlugin,
    RandomSelectorPlugin,
    RouterPlugin,
    SelectorPlugin,
    SparseUpdatePlugin,
    TaskStartPlugin,
    TreeBuilderPlugin,
)
from treelora_avalanche.strategies.base.arguments import UnmergedLoRAOptions
from treelora_avalanche.strategies.base.parameter_efficient import fits_head
from treelora_avalanche.strategies.seq_lora import SeqLoRA
from treelora_avalanche.tree import AdapterTree

SELECTORS: dict[str, type[SelectorPlugin]] = dict(
    zip(
        SELECTIONS,
        (LCBSelectorPlugin, NearestSelectorPlugin, RandomSelectorPlugin),
        strict=True,
    )
)


class TreeLoRAStrategy(SeqLoRA):
    """LoRA regularised, layer by layer, towards the adapter of the most similar past task.

    Finished tasks are the leaves of a K-D tree over their signatures, the directions in which they
    moved the adapter (thresholds, Eq. 1). During training a bandit search on the tree by lower
    confidence bounds (Eq. 2) evaluates one past task k_l per layer l and step, and the sparse
    update is the proximal step of ``lambda * sum_l ||theta^l - theta_{k_l}^l||_1`` (Eq. 3), which
    keeps most coordinates of the adapter equal to the selected one's. With ``tree_lambda=0`` and
    ``inference="last"`` this is :class:`SeqLoRA`, bit for bit.

    Stores per task, on the host, one adapter, a signature of 256 numbers per adapted matrix, and
    two tree nodes of 256 numbers each; with ``inference="routed"`` also class statistics. The
    device holds one copy of the selected factors. Task labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        strategy = TreeLoRAStrategy(model, head="task_adaptive", lr=0.005, train_epochs=20)
        for experience in SplitCIFAR100(preprocessing=model).train_stream:
            strategy.train(experience)
        print(strategy.tree)

    :param model: a pretrained model, see :class:`SeqLoRA`.
    :param tree_lambda: strength lambda of the penalty (Eq. 3). The paper's is 0.1 for ViTs and 0.5
        for language models. Default 0.5 with ``inference="last"``, 0 for routed language models,
        else 0.1 (docs/results.md).
    :param selection: ``"lcb"``, the paper's search; ``"nearest"``, exact nearest neighbour over all
        stored signatures; ``"random"``, the control.
    :param depth: levels of the tree; default the number of adapted matrices, at most 64.
    :param max_adapters: storage budget, beyond which the two closest adapters are merged; None
        keeps all.
    :param seed: seed of the selection.
    :param inference: the adapter used for prediction. ``"merged"``: the mean of all tasks'
        adapters, the tree's root, which also initialises the next task
        (:class:`~treelora_avalanche.plugins.MergedAdapterPlugin`). ``"last"``: the last task's, as
        in the paper. ``"routed"``: per sample, that of the task predicted from frozen features; a
        task is initialised from the most similar past adapter
        (:class:`~treelora_avalanche.plugins.TaskStartPlugin`). Merging and routing of images need
        a head that is fitted to the adapter used: default ``"merged"`` with
        ``head="task_adaptive"``, else ``"last"`` (docs/does_the_tree_matter.md). Language models
        have no head: default ``"routed"``, per prompt, with none for a prompt that is foreign to
        all tasks (:class:`~treelora_avalanche.plugins.PromptRouterPlugin`).
    :param foreign_quantile: quantile of the training prompts' distances beyond which a routed
        prompt is foreign, in (0, 1); None for never.
    :param router_layer: decoder layer whose input the router reads, see
        :class:`~treelora_avalanche.models.views.routed_language.RoutedLanguageModel`.
    :param plugins: further plugins, which run after a finished task is stored and before the
        selection; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tree_lambda: float | None = None,
        selection: str = "lcb",
        depth: int | None = None,
        max_adapters: int | None = None,
        seed: int = 0,
        inference: str | None = None,
        foreign_quantile: float | None = 0.99,
        router_layer: int | None = None,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[UnmergedLoRAOptions],
    ):
        check_known("`selection`", selection, SELECTIONS)
        language = find_host(model)
        if inference is None:
            fitted = fits_head(kwargs.get("head", "linear"), plugins)
            inference = "merged" if fitted else "last"
            if language is not None and supports_split(language):
                inference = "routed"
        check_known("`inference`", inference, INFERENCE)
        if tree_lambda is None:
            pulled = ROUTED_LANGUAGE_TREE_LAMBDA if language is not None else TREE_LAMBDA
            tree_lambda = LAST_TREE_LAMBDA if inference == "last" else pulled
        if depth is not None:
            _check_depth(depth, model, kwargs)
        self.tree_lambda = tree_lambda
        self.tree = AdapterTree(depth, max_adapters=max_adapters)
        self.bank = AdapterBank()
        options = {} if selection == "nearest" else {"seed": seed}
        self.selector = SELECTORS[selection](self.tree, **options)
        self.inference = inference
        self.router_layer = router_layer
        selecting = [self.selector, SparseUpdatePlugin(self.selector, self.bank, tree_lambda)]
        if inference == "routed":
            selecting.append(
                RouterPlugin(self.tree, seed)
                if language is None
                else PromptRouterPlugin(self.tree, quantile=foreign_quantile, seed=seed)
            )
        plugins = [*self._storing_plugins(seed), *(plugins or ()), *selecting]
        super().__init__(model=model, plugins=plugins, **kwargs)

    def _storing_plugins(self, seed: int) -> list[SupervisedPlugin]:
        """Plugins that store a finished task; before the head, which is fitted to their result."""
        storing: list[SupervisedPlugin] = [TreeBuilderPlugin(self.tree, self.bank)]
        if self.inference == "merged":
            storing.append(MergedAdapterPlugin())
        elif self.inference == "routed":
            storing.append(TaskStartPlugin(self.tree, self.bank, seed=seed))
        return storing

    def _view(self, model: nn.Module) -> TrainableView:
        if self.inference != "routed":
            return super()._view(model)
        if isinstance(model, AdapterHost):
            return RoutedLanguageModel(_splittable(model), self.bank, layer=self.router_layer)
        return RoutedAdapters(model, self.bank)

    def route(self, prompts: Sequence[str], batch_size: int = 8) -> list[Route]:
        """Returns the task whose adapter each prompt would get, and why.

        A route without a task is one to the base model, as the prompt is foreign. Nothing is
        generated. Example::

            strategy.route(["Translate to German: good morning"])[0].task_name  # None

        :param prompts: texts.
        :param batch_size: prompts per batch.
        :raises RuntimeError: before the first task, or if the strategy does not route prompts.
        """
        if not isinstance(self.model, RoutedLanguageModel):
            raise RuntimeError(
                "`inference` should be 'routed', and the model a language model, for prompts to be "
                f"routed, but it is {self.inference!r}."
            )
        return self.model.route(prompts, batch_size)


def _splittable(model: nn.Module) -> LanguageModel:
    if supports_split(model):
        return model
    raise ValueError(
        f"`inference` is 'routed', which takes a LanguageModel with a list of decoder layers, but "
        f"this {type(model).__name__} has none. Use inference='last'."
    )


def _check_depth(depth: int, model: nn.Module, options: UnmergedLoRAOptions) -> None:
    n_layers = len(lora_layers(model)) or len(
        find_adaptable_layers(model, options.get("layers"), options.get("target_modules"))
    )
    if depth > n_layers:
        raise ValueError(
            f"`depth` should be at most the number of adapted matrices, {n_layers}, but is {depth}."
            " Lower it, or adapt more layers."
        )
