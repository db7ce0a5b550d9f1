"""On-policy replay (Chen et al. 2026, arXiv 2605.29495)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.plugins import OnPolicyReplayPlugin
from treelora_avalanche.strategies.base.arguments import LoRAOptions, check_language_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class OnPolicyReplay(SeqLoRA):
    """:class:`SeqLoRA` that also trains on its own generations for past prompts.

    No reference answer of the past is used; for the method and how it differs from the paper's see
    :class:`~treelora_avalanche.plugins.OnPolicyReplayPlugin`. Stores ``replay_share`` of the
    prompts of each task. Task labels are not used.

    Example::

        strategy = OnPolicyReplay(create_language_model("gpt2"), replay_share=0.1)

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, with LoRA or without.
    :param replay_share: share of a task's training prompts that is kept; the paper's are 0.01 and
        0.1.
    :param seed: seed of the choice of prompts.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range, or the model is of another kind; the model
        is then unchanged. ``train`` raises one for an experience without prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        replay_share: float = 0.1,
        seed: int = 0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[LoRAOptions],
    ):
        check_language_model(model, "OnPolicyReplay")
        replay = OnPolicyReplayPlugin(replay_share, seed)
        super().__init__(model=model, plugins=[*(plugins or ()), replay], **kwargs)
