"""L2P (Wang et al., CVPR 2022, arXiv 2112.08654)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.optim import Adam
from typing_extensions import Unpack

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.defaults import L2P_LR
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.prompts.language_input import add_prompt_pool
from treelora_avalanche.models.prompts.pools import PromptPool
from treelora_avalanche.models.prompts.vit import PromptTunedViT, check_vision_transformer
from treelora_avalanche.plugins import KeyLossPlugin, WithinTaskLossPlugin
from treelora_avalanche.strategies.base.arguments import TrainingOptions
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)


class L2P(ParameterEfficientStrategy):
    """Learning to Prompt: each sample selects its prompts from a pool by key similarity.

    The query of an image is its feature from the frozen backbone without prompts (a second forward
    pass). The ``top_k`` prompts with the highest cosine similarity between key and query are
    prepended to the image's tokens, and the classifier receives the mean output at their positions.
    The loss pulls the selected keys to the query (Eq. 5) and compares the current task's classes
    only.

    The query of a text is the mean of the frozen embeddings of its first ``query_length`` tokens,
    without a second pass: the same in training and in generation, unless the prompt is shorter than
    ``query_length``, when the training query includes tokens of the answer. The selected prompts
    are prepended to the embeddings of the text.

    Replaces Avalanche's ``LearningToPrompt``, which fails under timm 0.9 and later, and keeps its
    argument names ``pool_size``, ``prompt_length``, ``top_k``, ``lr`` and ``sim_coefficient``.
    There is no ``batchwise_prompt``: prompts chosen by the majority of a batch depend on the other
    samples in it, which leaks the task at test time.

    Where paper and released code differ, this follows the paper: a pool of 30 prompts of length 5
    (TreeLoRA's setting; L2P's own for CIFAR-100 is 10), coefficient 0.5 (code: 0.1 or 1), learning
    rate 0.03 with Adam. Stores nothing per task: the pool, ``pool_size * (prompt_length + 1)``
    vectors, has a fixed size. Task labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        strategy = L2P(model, pool_size=10, lr=0.03)

    :param model: a pretrained VisionTransformer of timm, frozen except for its classifier; or a
        frozen :class:`~treelora_avalanche.models.LanguageModel`, whose ``max_length`` must leave
        room in the context for ``top_k * prompt_length`` tokens.
    :param pool_size: number of prompts in the pool.
    :param prompt_length: tokens per prompt.
    :param top_k: prompts per sample.
    :param sim_coefficient: weight of the key loss.
    :param query_length: tokens of a text that its query is computed from. Chat templates begin all
        prompts alike, by some tens of tokens; it must reach beyond them.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of
        :class:`~treelora_avalanche.strategies.base.parameter_efficient.ParameterEfficientStrategy`;
        ``lr`` is 0.03 by default, and the default optimizer Adam.
    :raises ValueError: if an argument is out of range, or the model is of another kind; the model
        is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pool_size: int = 30,
        prompt_length: int = 5,
        top_k: int = 5,
        sim_coefficient: float = 0.5,
        query_length: int = 64,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[TrainingOptions],
    ):
        check_training(model, plugins=plugins, **kwargs)
        own: list[SupervisedPlugin] = [KeyLossPlugin(sim_coefficient)]
        sizes = {"pool_size": pool_size, "length": prompt_length, "top_k": top_k}
        if isinstance(model, LanguageModel):
            add_prompt_pool(model, **sizes, query_length=query_length)
        else:
            own.insert(0, WithinTaskLossPlugin())
            vit = check_vision_transformer(model, "L2P", or_language=True)
            model = PromptTunedViT(vit, PromptPool(**sizes, dim=vit.num_features))
        if kwargs.get("optimizer") is None:
            lr = kwargs.pop("lr", None)
            kwargs["optimizer"] = partial(Adam, lr=L2P_LR if lr is None else lr)
        super().__init__(model=TrainableView(model), plugins=[*(plugins or ()), *own], **kwargs)
