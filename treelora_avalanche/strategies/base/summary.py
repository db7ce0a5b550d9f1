"""Text summary of a strategy for ``print``."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from treelora_avalanche.adapters import TrainableView, find_host, lora_layers
from treelora_avalanche.adapters.classifier import find_classifiers
from treelora_avalanche.metrics.footprint import count_parameters
from treelora_avalanche.plugins import MergedAdapterPlugin


class StrategySummary:
    """Mixin for strategies: ``print(strategy)`` shows what is trained, and how far it has come.

    >>> print(TreeLoRAStrategy(timm.create_model("vit_tiny_patch16_224", num_classes=10)))
    TreeLoRAStrategy(
      model: VisionTransformer
      adapters: LoRA on 5 layers in blocks 0-4, rank 10, alpha 10
      parameters: 40,330 trainable of 5,564,...
      head: Linear(192, 10)
      optimizer: Adam, lr 0.005
      experiences: 0
    )
    """

    def __repr__(self: Any) -> str:
        if "clock" not in vars(self):  # the constructor has not finished
            return object.__repr__(self)
        counts = count_parameters(self.model)
        lines = {
            "model": _model_in_words(self.model),
            "adapters": _adapters_in_words(self.model),
            "parameters": f"{counts['trainable']:,} trainable of {counts['total']:,}",
            "head": _head_in_words(self),
            **_merge_in_words(self),
            "optimizer": _optimizer_in_words(self),
            "experiences": str(self.clock.train_exp_counter),
        }
        body = "".join(f"  {name}: {text}\n" for name, text in lines.items())
        return f"{type(self).__name__}(\n{body})"


def _model_in_words(model: nn.Module) -> str:
    host = find_host(model)
    if host is not None:
        return f"{type(host).__name__}({_base_class(host.network)})"
    return _base_class(model.module if isinstance(model, TrainableView) else model)


def _base_class(model: nn.Module) -> str:
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def _adapters_in_words(model: nn.Module) -> str:
    layers = lora_layers(model)
    if not layers:
        return "none"
    blocks = sorted({int(part) for name in layers for part in name.split(".") if part.isdigit()})
    layer: Any = next(iter(layers.values()))
    active = layer.active_adapters[0]
    return (
        f"LoRA on {len(layers)} layers in blocks {_ranges(blocks)}, rank {layer.r[active]}, "
        f"alpha {layer.lora_alpha[active]:g}"
    )


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as ranges, such as ``0-4, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _head_in_words(strategy: Any) -> str:
    heads = find_classifiers(strategy.model).values()
    if not heads:
        return "none"
    text = ", ".join(map(_module_in_words, heads))
    fitted = [type(p).__name__ for p in strategy.plugins if getattr(p, "fits_head", False)]
    return f"{text}, fitted by {fitted[0]}" if fitted else text


def _merge_in_words(strategy: Any) -> dict[str, str]:
    kinds = [p.merge for p in strategy.plugins if isinstance(p, MergedAdapterPlugin)]
    return {"predicts with": f"the adapters of all tasks, merged ({kinds[0]})"} if kinds else {}


def _module_in_words(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"Linear({module.in_features}, {module.out_features})"
    return type(module).__name__


def _optimizer_in_words(strategy: Any) -> str:
    if strategy.train_epochs == 0:
        return "none"
    optimizer = strategy.optimizer
    return f"{type(optimizer).__name__}, lr {optimizer.param_groups[0]['lr']:g}"
