"""L2P (Wang et al., CVPR 2022, arXiv 2112.08654) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.optim import Adam

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.prompts.language_input import add_prompt_pool
from treelora_avalanche.models.prompts.pools import PromptPool
from treelora_avalanche.models.prompts.vit import PromptTunedViT, check_vision_transformer
from treelora_avalanche.plugins import KeyLossPlugin, WithinTaskLossPlugin
from treelora_avalanche.strategies.base.arguments import positional_model
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)


@positional_model
class L2P(ParameterEfficientStrategy):
    """Learning to Prompt: each sample picks its prompts from one pool, by the nearest keys.

    The query of an image is the feature of the frozen backbone, without prompts (a second pass, in
    training too); the ``top_k`` prompts whose keys are nearest to it by cosine are put before the
    image's tokens, and the classifier sees the mean of what comes out at their places. Keys are
    pulled to the queries that pick them. While a task is trained, the loss compares its classes
    alone.

    The query of a text is the mean of the frozen embeddings of its first ``query_length`` tokens,
    without a second pass. They are the prompt's, so that a text has the same query when it is
    trained and when its answer is generated; of a shorter prompt the answer has a part in the query
    that is trained. The picked prompts are put before the embeddings of the text.

    Stands in for Avalanche's ``LearningToPrompt``, which does not start under timm 0.9 and later,
    and keeps the names of its arguments: ``pool_size``, ``prompt_length``, ``top_k``, ``lr`` and
    ``sim_coefficient``. There is no ``batchwise_prompt``: prompts chosen by the majority of a batch
    depend on the other samples in it, which leaks the task at test time. Stores nothing per task:
    the pool, ``pool_size * (prompt_length + 1)`` vectors, is there from the beginning.

    Where the paper and released code differ, this is the paper: pool of 30 prompts of length 5
    (TreeLoRA's setting; L2P's own for CIFAR-100 is 10), coefficient 0.5 (code: 0.1 or 1), learning
    rate 0.03.

    :param model: a pretrained VisionTransformer of timm, which is frozen, but for its classifier;
        or a :class:`~treelora_avalanche.models.LanguageModel`, which is frozen, and whose
        ``max_length`` must leave room in the context for ``top_k * prompt_length`` tokens.
    :param pool_size: number of prompts in the pool.
    :param prompt_length: tokens per prompt.
    :param top_k: prompts per sample.
    :param sim_coefficient: weight of the keys' distance in the loss.
    :param query_length: tokens that the query of a text is taken from. Chat templates begin all
        prompts alike, by some tens of tokens; it must reach beyond.
    :param lr: learning rate of Adam, which is the default ``optimizer``.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`ParameterEfficientStrategy`.
    :raises ValueError: if an argument is out of range, or the model of another kind; it is then as
        it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        pool_size: int = 30,
        prompt_length: int = 5,
        top_k: int = 5,
        sim_coefficient: float = 0.5,
        query_length: int = 64,
        lr: float = 0.03,
        head: str = "linear",
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        check_training(model, head=head, plugins=plugins, **kwargs)
        own: list[SupervisedPlugin] = [KeyLossPlugin(sim_coefficient)]
        sizes = {"pool_size": pool_size, "length": prompt_length, "top_k": top_k}
        if isinstance(model, LanguageModel):
            add_prompt_pool(model, **sizes, query_length=query_length)
        else:
            own.insert(0, WithinTaskLossPlugin())
            vit = check_vision_transformer(model, "L2P", or_language=True)
            model = PromptTunedViT(vit, PromptPool(**sizes, dim=vit.num_features))
        if kwargs.get("optimizer") is None:
            kwargs["optimizer"] = partial(Adam, lr=lr)
        super().__init__(
            model=TrainableView(model),
            head=head,
            plugins=[*(plugins or ()), *own],
            **kwargs,
        )
