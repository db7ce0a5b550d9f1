"""Gradient accumulation: several mini-batches per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from avalanche.training.plugins import AGEMPlugin, GEMPlugin, SupervisedPlugin

from treelora_avalanche.models.token_loss import IGNORED


class GradientAccumulation:
    """Mixin for strategies: accumulates the gradients of several mini-batches before each step.

    The step equals that of one batch of all samples: with n_i targets in mini-batch i (for language
    models, the tokens of the answers), the gradient is that of ``sum_i n_i loss_i / sum_i n_i``.
    Hooks around an iteration and an update are called once per step, hooks around forward and
    backward once per mini-batch.

    Example::

        SeqLoRA(model, train_mb_size=8, accumulation_steps=4)  # steps of 32 samples

    :ivar accumulation_steps: mini-batches per step; the last step of an epoch may have fewer.
    """

    accumulation_steps = 1

    def training_epoch(self: Any, **kwargs: Any) -> None:
        """Trains for one pass over the data.

        :param kwargs: passed to the hooks.
        """
        if self.accumulation_steps == 1:
            super().training_epoch(**kwargs)  # type: ignore[misc]
            return
        batches = iter(self.dataloader)
        while group := list(islice(batches, self.accumulation_steps)):
            if self._stop_training:
                break
            self._step(group, **kwargs)

    def _step(self: Any, group: Sequence[Any], **kwargs: Any) -> None:
        # Counted before the batches go to the device, so that nothing waits for it.
        counts = [int((batch[1] != IGNORED).sum()) for batch in group]
        total = max(1, sum(counts))
        self.mbatch = group[0]
        self._unpack_minibatch()
        self._before_training_iteration(**kwargs)
        self.optimizer.zero_grad()
        loss = self._make_empty_loss()
        for self.mbatch, count in zip(group, counts, strict=True):
            self._unpack_minibatch()
            self.loss = self._make_empty_loss()
            self._before_forward(**kwargs)
            self.mb_output = self.forward()
            self._after_forward(**kwargs)
            self.loss += self.criterion()
            self._before_backward(**kwargs)
            self.loss = self.loss * (count / total)
            self.backward()
            self._after_backward(**kwargs)
            loss += self.loss.detach()
        self.loss = loss
        self._before_update(**kwargs)
        self.optimizer_step()
        self._after_update(**kwargs)
        self._after_training_iteration(**kwargs)


def check_accumulation(steps: int, plugins: Sequence[SupervisedPlugin]) -> None:
    """Raises an error if mini-batches cannot share a step.

    A plugin that needs the gradient of a whole step in every backward pass declares
    ``supports_accumulation = False``.

    :param steps: mini-batches per step.
    :param plugins: the strategy's plugins.
    :raises ValueError: if ``steps`` is below 1, or a plugin does not support accumulation.
    """
    if steps < 1:
        raise ValueError(
            f"`accumulation_steps` should be at least 1, but is {steps}. Use 1 for a step per "
            "mini-batch."
        )
    for plugin in plugins:
        if steps > 1 and not _supports_accumulation(plugin):
            raise ValueError(
                f"`accumulation_steps` should be 1 with {type(plugin).__name__}, which compares "
                f"the gradient of a whole step with those of past tasks, but is {steps}. Use "
                "accumulation_steps=1 with a larger train_mb_size."
            )


def _supports_accumulation(plugin: SupervisedPlugin) -> bool:
    avalanches = not isinstance(plugin, (GEMPlugin, AGEMPlugin))  # which declare nothing
    return bool(getattr(plugin, "supports_accumulation", avalanches))
