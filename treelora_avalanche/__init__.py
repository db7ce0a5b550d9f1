"""Continual fine-tuning of pretrained transformers, as Avalanche strategies.

Names are imported on first access: torch and Avalanche take seconds to import, and
``treelora --help`` needs neither. Example::

    from treelora_avalanche import TreeLoRAStrategy

    strategy = TreeLoRAStrategy(model, train_epochs=4, device="cuda")
    for experience in benchmark.train_stream:
        strategy.train(experience)
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
    from treelora_avalanche.models import (
        LanguageModel,
        TokenCrossEntropy,
        create_language_model,
        create_text_encoder,
    )
    from treelora_avalanche.plugins import (
        ContrastivePlugin,
        CosineSchedulePlugin,
        DemonstrationsPlugin,
        InfLoRAPlugin,
        KeyLossPlugin,
        L2AnchorPlugin,
        LCBSelectorPlugin,
        OGDPlugin,
        OLoRAPlugin,
        SAPTPlugin,
        SparseUpdatePlugin,
        TaskAdaptersPlugin,
        TaskAdaptiveHeadPlugin,
        TaskPromptsPlugin,
        TaSLPlugin,
        TreeBuilderPlugin,
        WithinTaskLossPlugin,
    )
    from treelora_avalanche.strategies import (
        L2P,
        OGD,
        SAPT,
        DualPrompt,
        EWCLoRA,
        FrozenGaussian,
        FrozenNCM,
        GEMLoRA,
        HiDeLoRA,
        HiDePrompt,
        InContext,
        InfLoRA,
        L2Anchor,
        OLoRA,
        SeqLoRA,
        TaSL,
        TreeLoRAStrategy,
    )
    from treelora_avalanche.tree import AdapterTree

_HOME = {
    "AccuracyMatrix": "metrics",
    "AdapterBank": "adapters",
    "AdapterTree": "tree",
    "BackwardTransfer": "metrics",
    "CosineSchedulePlugin": "plugins",
    "ContrastivePlugin": "plugins",
    "DemonstrationsPlugin": "plugins",
    "DualPrompt": "strategies",
    "EWCLoRA": "strategies",
    "FrozenGaussian": "strategies",
    "FrozenNCM": "strategies",
    "GEMLoRA": "strategies",
    "GenerationScore": "metrics",
    "HiDeLoRA": "strategies",
    "HiDePrompt": "strategies",
    "InContext": "strategies",
    "InfLoRA": "strategies",
    "InfLoRAPlugin": "plugins",
    "KeyLossPlugin": "plugins",
    "L2Anchor": "strategies",
    "L2AnchorPlugin": "plugins",
    "L2P": "strategies",
    "LCBSelectorPlugin": "plugins",
    "LanguageModel": "models",
    "OGD": "strategies",
    "OGDPlugin": "plugins",
    "OLoRA": "strategies",
    "OLoRAPlugin": "plugins",
    "OverallPerformance": "metrics",
    "PastAdapters": "adapters",
    "SAPT": "strategies",
    "SAPTPlugin": "plugins",
    "SeqLoRA": "strategies",
    "SparseUpdatePlugin": "plugins",
    "TaSL": "strategies",
    "TaSLPlugin": "plugins",
    "TaskAdaptersPlugin": "plugins",
    "TaskAdaptiveHeadPlugin": "plugins",
    "TaskPromptsPlugin": "plugins",
    "TokenCrossEntropy": "models",
    "TrainableView": "adapters",
    "TreeBuilderPlugin": "plugins",
    "TreeLoRAStrategy": "strategies",
    "WithinTaskLossPlugin": "plugins",
    "add_lora": "adapters",
    "continual_metrics": "metrics",
    "create_language_model": "models",
    "create_text_encoder": "models",
    "generation_metrics": "metrics",
    "load_adapter": "adapters",
}

__all__ = [
    "L2P",
    "OGD",
    "SAPT",
    "AccuracyMatrix",
    "AdapterBank",
    "AdapterTree",
    "BackwardTransfer",
    "ContrastivePlugin",
    "CosineSchedulePlugin",
    "DemonstrationsPlugin",
    "DualPrompt",
    "EWCLoRA",
    "FrozenGaussian",
    "FrozenNCM",
    "GEMLoRA",
    "GenerationScore",
    "HiDeLoRA",
    "HiDePrompt",
    "InContext",
    "InfLoRA",
    "InfLoRAPlugin",
    "KeyLossPlugin",
    "L2Anchor",
    "L2AnchorPlugin",
    "LCBSelectorPlugin",
    "LanguageModel",
    "OGDPlugin",
    "OLoRA",
    "OLoRAPlugin",
    "OverallPerformance",
    "PastAdapters",
    "SAPTPlugin",
    "SeqLoRA",
    "SparseUpdatePlugin",
    "TaSL",
    "TaSLPlugin",
    "TaskAdaptersPlugin",
    "TaskAdaptiveHeadPlugin",
    "TaskPromptsPlugin",
    "TokenCrossEntropy",
    "TrainableView",
    "TreeBuilderPlugin",
    "TreeLoRAStrategy",
    "WithinTaskLossPlugin",
    "__version__",
    "add_lora",
    "continual_metrics",
    "create_language_model",
    "create_text_encoder",
    "generation_metrics",
    "load_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
