"""Steps of the optimizer that several batches share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from avalanche.training.plugins import AGEMPlugin, GEMPlugin, SupervisedPlugin

from treelora_avalanche.models.token_loss import IGNORED


class GradientAccumulation:
    """Mixin for strategies: the gradients of several batches make one step of the optimizer.

    The step is that of one batch of all their samples: every batch weighs by its number of targets
    (of a language model, the tokens of its answers), as the mean over all of them does. The hooks
    around an iteration and an update are called once per step, those around forward and backward
    once per batch.

    :attr:`accumulation_steps` is the number of batches; the last step of an epoch may have fewer.
    """

    accumulation_steps = 1

    def training_epoch(self: Any, **kwargs: Any) -> None:
        """One pass over the data.

        :param kwargs: handed on to the hooks.
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
    """Raise an error if batches cannot share a step.

    :param steps: batches per step.
    :param plugins: the strategy's plugins.
    :raises ValueError: if there are too few, or a plugin edits the gradient as a whole.
    """
    if steps < 1:
        raise ValueError(f"`accumulation_steps` must be at least 1, and is {steps}.")
    for plugin in plugins:
        if steps > 1 and isinstance(plugin, (GEMPlugin, AGEMPlugin)):
            raise ValueError(
                f"`accumulation_steps` is {steps}, and {type(plugin).__name__} compares the "
                "gradient of one batch with those of past tasks, which a part of a sum is not; use "
                "accumulation_steps=1 with a larger train_mb_size."
            )
