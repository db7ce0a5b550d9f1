"""Continual fine-tuning of pretrained transformers, as Avalanche strategies.

The strategies, plugins and metrics are loaded when they are first asked for: importing torch and
Avalanche takes seconds, and ``treelora --help`` needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from treelora_avalanche._version import __version__

if TYPE_CHECKING:
    from treelora_avalanche.adapters import (
        AdapterBank,
        PastAdapters,
        TrainableView,
        add_lora,
        load_adapter,
    )
    from treelora_avalanche.metrics import (
        AccuracyMatrix,
        BackwardTransfer,
        GenerationScore,
        OverallPerformance,
        continual_metrics,
        generation_metrics,
    )
    from treelora_avalanche.plugins import (
        InfLoRAPlugin,
        L2AnchorPlugin,
        LCBSelectorPlugin,
        OGDPlugin,
        OLoRAPlugin,
        SparseUpdatePlugin,
        TaskAdaptiveHeadPlugin,
        TreeBuilderPlugin,
    )
    from treelora_avalanche.strategies import (
        OGD,
        EWCLoRA,
        FrozenGaussian,
        FrozenNCM,
        GEMLoRA,
        InfLoRA,
        L2Anchor,
        OLoRA,
        SeqLoRA,
        TreeLoRAStrategy,
    )
    from treelora_avalanche.tree import AdapterTree

_HOME = {
    "AccuracyMatrix": "metrics",
    "AdapterBank": "adapters",
    "AdapterTree": "tree",
    "BackwardTransfer": "metrics",
    "EWCLoRA": "strategies",
    "FrozenGaussian": "strategies",
    "FrozenNCM": "strategies",
    "GEMLoRA": "strategies",
    "GenerationScore": "metrics",
    "InfLoRA": "strategies",
    "InfLoRAPlugin": "plugins",
    "L2Anchor": "strategies",
    "L2AnchorPlugin": "plugins",
    "LCBSelectorPlugin": "plugins",
    "OGD": "strategies",
    "OGDPlugin": "plugins",
    "OLoRA": "strategies",
    "OLoRAPlugin": "plugins",
    "OverallPerformance": "metrics",
    "PastAdapters": "adapters",
    "SeqLoRA": "strategies",
    "SparseUpdatePlugin": "plugins",
    "TaskAdaptiveHeadPlugin": "plugins",
    "TrainableView": "adapters",
    "TreeBuilderPlugin": "plugins",
    "TreeLoRAStrategy": "strategies",
    "add_lora": "adapters",
    "continual_metrics": "metrics",
    "generation_metrics": "metrics",
    "load_adapter": "adapters",
}

__all__ = [
    "OGD",
    "AccuracyMatrix",
    "AdapterBank",
    "AdapterTree",
    "BackwardTransfer",
    "EWCLoRA",
    "FrozenGaussian",
    "FrozenNCM",
    "GEMLoRA",
    "GenerationScore",
    "InfLoRA",
    "InfLoRAPlugin",
    "L2Anchor",
    "L2AnchorPlugin",
    "LCBSelectorPlugin",
    "OGDPlugin",
    "OLoRA",
    "OLoRAPlugin",
    "OverallPerformance",
    "PastAdapters",
    "SeqLoRA",
    "SparseUpdatePlugin",
    "TaskAdaptiveHeadPlugin",
    "TrainableView",
    "TreeBuilderPlugin",
    "TreeLoRAStrategy",
    "__version__",
    "add_lora",
    "continual_metrics",
    "generation_metrics",
    "load_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
