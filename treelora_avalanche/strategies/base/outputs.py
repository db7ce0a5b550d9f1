"""Check that a model takes samples alone and returns logits."""

from __future__ import annotations

from avalanche.models import MultiTaskModule
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.adapters.other_libraries import is_image_model, use_timm


def check_returns_logits(model: nn.Module) -> None:
    """Raises an error for models of transformers, and for those with a head per task.

    :param model: any model.
    :raises ValueError: if it is one.
    """
    inner = model.module if isinstance(model, TrainableView) else model
    inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    if isinstance(inner, PreTrainedModel):
        remedy = (
            "Wrap it as `treelora_avalanche.models.LanguageModel(model, tokenizer)`, or make it "
            "with `create_language_model` or `create_text_encoder`."
        )
        raise ValueError(
            "`model` should return logits, but is a transformers model "
            f"({type(inner).__name__}), which returns more. "
            f"{use_timm(inner) if is_image_model(inner) else remedy}"
        )
    if any(isinstance(module, MultiTaskModule) for module in inner.modules()):
        raise ValueError(
            f"`model` should have one head for all tasks, but this {type(inner).__name__} has one "
            "for each, chosen by task labels, which are not used. Pass it without `as_multitask`, "
            "with num_classes for all tasks together."
        )
