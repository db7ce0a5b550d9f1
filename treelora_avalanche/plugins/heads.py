"""Plugins by the name of the head that they fit."""

from __future__ import annotations

from functools import partial
from typing import Any

from treelora_avalanche.plugins.class_statistics import ClassStatisticsPlugin
from treelora_avalanche.plugins.task_adaptive_head import FROZEN_SHARE, TaskAdaptiveHeadPlugin
from treelora_avalanche.plugins.trained_head import TrainedHeadPlugin

_FITTED: dict[str, Any] = {
    "task_adaptive": TaskAdaptiveHeadPlugin,
    "task_adaptive_ensemble": partial(TaskAdaptiveHeadPlugin, frozen_share=FROZEN_SHARE),
    "task_adaptive_trained": TrainedHeadPlugin,
}


def head_plugins(head: str) -> list[ClassStatisticsPlugin]:
    """Returns the plugin that fits a head after every task; none for the linear one.

    >>> head_plugins("linear")
    []

    :param head: one of :data:`~treelora_avalanche.choices.HEADS`.
    """
    return [_FITTED[head]()] if head in _FITTED else []
