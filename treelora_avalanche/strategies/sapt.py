"""SAPT (Zhao et al., ACL 2024, arXiv 2401.08295) as an Avalanche strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.token_loss import IGNORED
from treelora_avalanche.models.views.attentive_language import AttentiveLanguageModel
from treelora_avalanche.plugins.baselines.sapt import SAPTPlugin
from treelora_avalanche.strategies.base.arguments import check_language_model, positional_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


@positional_model
class SAPT(SeqLoRA):
    """One adapter per task, all in use, weighed for each prompt by an attention over tasks.

    The same attention trains the adapters and chooses among them at test time, when no task is
    named. For the attention see
    :class:`~treelora_avalanche.models.views.attentive_language.SharedAttention`; for what stands in
    for the paper's generative replay, which is left out, see
    :class:`~treelora_avalanche.plugins.SAPTPlugin`. The query is the mean over the prompt's
    embeddings, and no token of the answer has a part in it: the targets tell where the prompt ends.
    (The released code takes the maximum, in which long prompts are all alike.)

    Stores per task one adapter, ``rank * (n_in + n_out)`` values per matrix, and a key of as many
    values as the model is wide. A saved adapter is that of its task alone, without the attention.

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, with LoRA or without.
    :param bottleneck: width of the middle of the projection that makes queries; that of the
        released code is 100.
    :param distillation: weight of the attention's distillation; that of the released code is 0.5.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA`.
    :raises ValueError: if an argument is out of range, or the model of another kind; it is then as
        it was.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        bottleneck: int = 100,
        distillation: float = 0.5,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Any,
    ):
        check_language_model(model, "SAPT")
        if bottleneck < 1:
            raise ValueError(f"`bottleneck` must be at least 1, and is {bottleneck}.")
        self.bottleneck = bottleneck
        self._sapt = SAPTPlugin(distillation)
        if isinstance(model, TrainableView):
            model = model.module  # the view must be one that attends
        super().__init__(model=model, plugins=[*(plugins or ()), self._sapt], **kwargs)

    def _view(self, model: nn.Module) -> TrainableView:
        view = AttentiveLanguageModel(model, self.bottleneck)  # type: ignore[arg-type]
        self._sapt.attention = view.attention
        return view

    def forward(self) -> Any:
        """The answer to the current batch, by the attention of its prompts."""
        x, y = self.mb_x, self.mb_y
        if y.ndim != 2:
            return self.model(x)
        last = y.shape[1] if y.shape[1] < x.shape[1] else None
        return self.model(x, last=last, n_prompt=prompt_lengths(y, x.shape[1]))


def prompt_lengths(targets: Tensor, length: int) -> Tensor:
    """How many tokens stand before the first answer token of each row.

    :param targets: -100 but on the answer, of the last columns of the rows, ``(batch, columns)``.
    :param length: columns of tokens.
    :return: ``(batch,)``; all columns where a row has no target.
    """
    labelled = targets != IGNORED
    # The target of a token is the one after it: the first target stands at the prompt's last.
    n_prompt = labelled.int().argmax(1) + 1 + length - targets.shape[1]
    return n_prompt.where(labelled.any(1), length)
