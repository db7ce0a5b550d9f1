"""Saving and loading of adapters as peft folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from treelora_avalanche.adapters.attach import call_projections, lora_layers
from treelora_avalanche.adapters.directions import active_magnitude, weighted_past
from treelora_avalanche.adapters.first_pass import check_at_first_pass


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Saves the active adapter, and the classifier trained with it, as a folder that peft loads.

    Past adapters, see :class:`PastAdapters`, are saved with the active one, as one adapter of their
    joint rank. The folder is written under another name and then renamed, so it is complete or
    absent::

        save_adapter(strategy.model, "adapters/task_003")

    :param model: a model that is, or wraps, a :class:`peft.PeftModel`.
    :param folder: the folder; an adapter that is already there is replaced.
    :raises ValueError: if there is no :class:`peft.PeftModel` in the model.
    """
    peft_model = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    if peft_model is None:
        raise ValueError(
            f"`model` should be or wrap a peft model, but is a {type(model).__name__}. Attach LoRA "
            "first with treelora_avalanche.adapters.add_lora(model)."
        )
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    # Embeddings are never trained here. To find that out, peft would ask the hub for their number.
    peft_model.save_pretrained(str(unfinished), save_embedding_layers=False)
    _join_past(peft_model, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def _join_past(model: PeftModel, folder: Path) -> None:
    """Stacks the past factors on the active ones: sum_i B_i A_i = (B_1 ... B_n)(A_1; ...; A_n)."""
    layers = {
        name: layer
        for name, layer in lora_layers(model).items()
        if len(weighted_past(layer)[0]) or active_magnitude(layer) != 1
    }
    if not layers:
        return
    adapter = model.active_adapter
    folder = folder if adapter == "default" else folder / adapter
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    tensors = load_file(file)
    for name, layer in layers.items():
        past_a, past_b = weighted_past(layer)
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[a] = torch.cat((past_a.cpu(), tensors[a]))
        tensors[b] = torch.cat((past_b.cpu(), active_magnitude(layer) * tensors[b]), 1)
        # Per layer, to keep the scaling: peft would divide alpha by the joint rank.
        rank = len(tensors[a])
        module = name.removeprefix("base_model.model.")
        config["rank_pattern"][module] = rank
        config["alpha_pattern"][module] = layer.scaling[adapter] * rank
    config["use_rslora"] = False
    save_file(tensors, file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Attaches a saved adapter to a pretrained model, to be trained further or evaluated::

        vit = create_vit("vit_base_patch16_224", num_classes=100)
        model = load_adapter(vit, "adapters/task_003")

    :param model: the pretrained model that the adapter was trained on.
    :param folder: a folder written by :func:`save_adapter`, or by peft.
    :return: the peft model around ``model``.
    :raises FileNotFoundError: if the folder holds no adapter.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"`folder` should hold an adapter, but {str(folder)!r} has no adapter_config.json. "
            "Pass one that save_adapter has written."
        )
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    call_projections(adapted, lora_layers(adapted))
    return check_at_first_pass(adapted)
