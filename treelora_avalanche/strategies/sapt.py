"""SAPT (Zhao et al., ACL 2024, arXiv 2401.08295)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.token_loss import IGNORED
from treelora_avalanche.models.views.attentive_language import AttentiveLanguageModel
from treelora_avalanche.plugins.baselines.sapt import SAPTPlugin
from treelora_avalanche.strategies.base.arguments import UnmergedLoRAOptions, check_language_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class SAPT(SeqLoRA):
    """One adapter per task, all in use, weighted per prompt by shared attention over the tasks.

    The same attention trains the adapters and selects them at test time, see
    :class:`~treelora_avalanche.models.views.attentive_language.SharedAttention`. The paper's
    generative replay is left out; the distillation that replaces it is
    :class:`~treelora_avalanche.plugins.SAPTPlugin`. The query is the mean of the prompt's
    embeddings without the answer, whose start the targets give. (The released code takes the
    maximum, which hardly differs between long prompts.)

    Stores per task one adapter, ``rank * (n_in + n_out)`` values per matrix, and a key as wide as
    the model. A saved adapter is that of its task alone, without the attention. Task labels are not
    used.

    Example::

        strategy = SAPT(create_language_model("meta-llama/Llama-2-7b-hf"), lr=1e-4)

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, with LoRA or without.
    :param bottleneck: hidden width of the query projection; the released code's is 100.
    :param distillation: weight of the attention's distillation; the released code's is 0.5.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range, or the model is of another kind; the model
        is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bottleneck: int = 100,
        distillation: float = 0.5,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[UnmergedLoRAOptions],
    ):
        check_language_model(model, "SAPT")
        if bottleneck < 1:
            raise ValueError(
                f"`bottleneck` should be at least 1, but is {bottleneck}. The released code's is "
                "100."
            )
        self.bottleneck = bottleneck
        self._sapt = SAPTPlugin(distillation)
        if isinstance(model, TrainableView):
            model = model.module  # its view is replaced by one with attention
        super().__init__(model=model, plugins=[*(plugins or ()), self._sapt], **kwargs)

    def _view(self, model: nn.Module) -> TrainableView:
        view = AttentiveLanguageModel(model, self.bottleneck)  # type: ignore[arg-type]
        self._sapt.attention = view.attention
        return view

    def forward(self) -> Any:
        """Returns the logits of the current batch, each adapter weighted by its prompt."""
        x, y = self.mb_x, self.mb_y
        if y.ndim != 2:
            return self.model(x)
        last = y.shape[1] if y.shape[1] < x.shape[1] else None
        return self.model(x, last=last, n_prompt=prompt_lengths(y, x.shape[1]))


def prompt_lengths(targets: Tensor, length: int) -> Tensor:
    """Returns the number of prompt tokens of each sequence.

    :param targets: -100 but on the answer, for the last columns, ``(batch, columns)``.
    :param length: columns of tokens.
    :return: ``(batch,)``; ``length`` for a sequence without targets.
    """
    labelled = targets != IGNORED
    # A token's target is the next token: the first target stands at the prompt's last.
    n_prompt = labelled.int().argmax(1) + 1 + length - targets.shape[1]
    return n_prompt.where(labelled.any(1), length)
