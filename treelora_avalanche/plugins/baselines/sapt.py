"""What SAPT (Zhao et al., ACL 2024, arXiv 2401.08295) does beside its attention."""

from __future__ import annotations

from itertools import chain
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.models.views.attentive_language import SharedAttention, attention_scores
from treelora_avalanche.state import check_keys, check_same_settings, forget


def attention_divergence(old: Tensor, new: Tensor) -> Tensor:
    """KL divergence of the attention over the past tasks from what it was, mean over the batch.

    The softmax is taken over the past tasks and one task more, whose score is always zero. Without
    it the attention over a single past task would be 1 whatever its score.

    :param old: scores by the attention before the task, ``(batch, n_past)``.
    :param new: scores now, ``(batch, n_past)``.
    :return: a scalar, 0 where nothing has changed.
    """
    before, now = (F.pad(scores, (1, 0)).log_softmax(1) for scores in (old, new))
    return F.kl_div(now, before, log_target=True, reduction="batchmean")


class SAPTPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """A new adapter and key for every experience; the attention over the past is held in place.

    In the paper, pseudo-samples of past tasks are generated, and their attention is held where it
    was (ARM, Section 4.2). Without generative replay, as the TreeLoRA paper compares it, there are
    no past inputs. What remains: adapters and keys of past tasks are frozen; and the attention that
    the *current* prompts give to past tasks is held where the projection before this task puts it,
    which keeps the projection from drifting (:func:`attention_divergence`, added to the loss from
    the second experience on). It costs one more projection of the prompts' means per step. Task
    labels are not used.

    :param distillation: weight of the divergence.
    :raises ValueError: if ``distillation`` is negative.
    """

    attention: SharedAttention
    """Set by the strategy, once its model has one."""

    def __init__(self, distillation: float = 0.5):
        super().__init__()
        if not distillation >= 0:
            raise ValueError(f"`distillation` must be at least 0, and is {distillation}.")
        self.distillation = distillation
        self._teacher: nn.Module | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Folds a trained adapter, with what the optimizer has gathered of it and of its key."""
        factors = LoRAFactors(strategy.model).parameters
        if any(b.detach().any() for _, b in factors):
            self.attention.fold()
            forget(strategy.optimizer, [self.attention.key, *chain.from_iterable(factors)])
        self._teacher = self.attention.teacher() if len(self.attention) else None

    def penalty(self) -> Tensor:
        """The weighted divergence of the current batch, a scalar.

        :raises RuntimeError: if there is no past, or no batch yet.
        """
        attention = self.attention
        if self._teacher is None or attention.inputs is None or attention.scores is None:
            raise RuntimeError("there is no attention to compare with: train a second experience.")
        old = attention_scores(self._teacher, attention.inputs, attention.past_keys)
        return self.distillation * attention_divergence(old, attention.scores[:, :-1])

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds the divergence to the loss."""
        if self._teacher is not None and self.distillation:
            strategy.loss = strategy.loss + self.penalty()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Lets the projection before the task go, and the last batch."""
        self._teacher = None
        self.attention.clear_batch()

    def state_dict(self) -> dict[str, Any]:
        """Factors and keys of the past tasks, and the weight."""
        return {"past": self.attention.past_state(), "distillation": float(self.distillation)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the past tasks into the model; the weight must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; nothing has changed then.
        """
        check_keys(state, {"past", "distillation"}, "the state of SAPTPlugin")
        check_same_settings(state, {"distillation": self.distillation})
        self.attention.load_past_state(state["past"])
