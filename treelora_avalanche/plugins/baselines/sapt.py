"""Training of SAPT (Zhao et al., ACL 2024, arXiv 2401.08295): an adapter and key per experience."""

from __future__ import annotations

from itertools import chain
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.models.views.attentive_language import SharedAttention, attention_scores
from treelora_avalanche.state import check_keys, check_same_settings, reset_optimizer_state


def attention_divergence(old: Tensor, new: Tensor) -> Tensor:
    """Returns ``KL(old ‖ new)`` of the attention over the past tasks, mean over the batch.

    The softmax is over the past tasks and one more task whose score is always zero. Without it the
    attention over a single past task would be 1 for any score.

    :param old: scores by the attention before the task, ``(batch, n_past)``.
    :param new: scores now, ``(batch, n_past)``.
    :return: a scalar, 0 where nothing has changed.
    """
    before, now = (F.pad(scores, (1, 0)).log_softmax(1) for scores in (old, new))
    return F.kl_div(now, before, log_target=True, reduction="batchmean")


class SAPTPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Trains a new adapter and key per experience, and regularises the attention over the past.

    The paper generates pseudo-samples of past tasks and keeps their attention unchanged (ARM,
    Section 4.2). Without generative replay, as in the TreeLoRA paper, there are no past inputs.
    What remains: adapters and keys of past tasks are frozen, and the attention that *current*
    prompts give to past tasks is kept near that of the projection before this task
    (:func:`attention_divergence`, added to the loss from the second experience on), so that the
    projection does not drift. Costs one more projection of the prompts' means per step. Task labels
    are not used. Example::

        plugin = SAPTPlugin(distillation=0.5)
        strategy = Naive(attentive_model, plugins=[plugin])
        plugin.attention = attentive_model.attention

    :param distillation: weight of the divergence.
    :raises ValueError: if ``distillation`` is negative.
    """

    requires_whole_adapter: str | None = "freezes a whole adapter per experience"
    """Read by :class:`~treelora_avalanche.plugins.FirstSessionPlugin`."""

    attention: SharedAttention
    """Set by the strategy, once its model has it."""

    def __init__(self, distillation: float = 0.5):
        super().__init__()
        if not distillation >= 0:
            raise ValueError(
                f"`distillation` should be at least 0, but is {distillation}. Use 0 for no penalty."
            )
        self.distillation = distillation
        self._teacher: nn.Module | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Folds a trained adapter, and resets the optimizer state of it and of its key."""
        factors = LoRAFactors(strategy.model).parameters
        if any(b.detach().any() for _, b in factors):
            self.attention.fold()
            reset_optimizer_state(
                strategy.optimizer, [self.attention.key, *chain.from_iterable(factors)]
            )
        self._teacher = self.attention.teacher() if len(self.attention) else None

    def penalty(self) -> Tensor:
        """Returns the weighted divergence of the current batch, a scalar.

        :raises RuntimeError: if there is no past task, or no batch yet.
        """
        attention = self.attention
        if self._teacher is None or attention.inputs is None or attention.scores is None:
            raise RuntimeError("the penalty needs past attention. Train a second experience.")
        old = attention_scores(self._teacher, attention.inputs, attention.past_keys)
        return self.distillation * attention_divergence(old, attention.scores[:, :-1])

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the divergence to the loss."""
        if self._teacher is not None and self.distillation:
            strategy.loss = strategy.loss + self.penalty()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Deletes the old projection and the last batch."""
        self._teacher = None
        self.attention.clear_batch()

    def state_dict(self) -> dict[str, Any]:
        """Returns factors and keys of the past tasks, and the weight."""
        return {"past": self.attention.past_state(), "distillation": float(self.distillation)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the past tasks into the model; the weight must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; nothing has changed then.
        """
        check_keys(state, {"past", "distillation"}, "the state of SAPTPlugin")
        check_same_settings(state, {"distillation": self.distillation})
        self.attention.load_past_state(state["past"])
