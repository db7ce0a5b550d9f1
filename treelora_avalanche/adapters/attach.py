"""Attach LoRA to a pretrained model with peft, and see the model through what is trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from treelora_avalanche.names import did_you_mean

LayerChoice = str | Sequence[int]

DEFAULT_LAYERS = "first:5"
DEFAULT_TARGET_MODULES = ("qkv",)


def find_adaptable_layers(
    model: nn.Module,
    layers: LayerChoice = DEFAULT_LAYERS,
    target_modules: Sequence[str] | None = None,
) -> list[str]:
    """Names of the linear layers that LoRA is to adapt, from the input side to the output side.

    :param model: a transformer whose module names number its blocks (``blocks.7.attn.qkv``).
    :param layers: which blocks: ``"first:k"``, ``"last:k"`` (all of them where there are fewer than
        k), ``"all"``, or a sequence of block numbers.
    :param target_modules: ends of the names of the linear layers inside a block, such as
        ``("qkv", "attn.proj", "fc1", "fc2")``; by default the fused ``qkv`` of timm's transformers.
    :return: the full module names.
    :raises ValueError: if the model has no such layers, or ``layers`` does not name blocks of it.
    """
    block_of: dict[str, int] = {}  # of every linear layer in a block, from the input side
    for name, module in model.named_modules():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if isinstance(module, nn.Linear) and block is not None:
            block_of[name] = block
    if not block_of:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no linear layers in numbered blocks to adapt; "
            "pass a transformer such as timm's vit_base_patch16_224, or a PeftModel of your own."
        )
    wanted = DEFAULT_TARGET_MODULES if target_modules is None else tuple(target_modules)
    for kind in wanted:
        if not any(name.endswith(f".{kind}") for name in block_of):
            known = list(dict.fromkeys(name.split(".")[-1] for name in block_of))
            raise ValueError(
                f"`target_modules` names {kind!r}, which no linear layer of the model's blocks is "
                f"called. Known: {', '.join(known)}.{did_you_mean(kind, known)}"
            )
    candidates = [n for n in block_of if any(n.endswith(f".{kind}") for kind in wanted)]
    chosen = _choose_blocks(layers, sorted({block_of[name] for name in candidates}))
    return [name for name in candidates if block_of[name] in chosen]


def _choose_blocks(layers: LayerChoice, blocks: list[int]) -> set[int]:
    if isinstance(layers, str):
        if layers == "all":
            return set(blocks)
        match = re.fullmatch(r"(first|last):([1-9]\d*)", layers)
        if match is None:
            raise ValueError(
                f"`layers` is {layers!r}; use 'first:k', 'last:k' (k at least 1), 'all', or a list "
                f"of block numbers.{did_you_mean(layers, ('first:5', 'last:5', 'all'))}"
            )
        k = int(match[2])
        return set(blocks[:k] if match[1] == "first" else blocks[-k:])
    unknown = [block for block in layers if block not in blocks]
    if unknown or not layers:
        raise ValueError(
            f"`layers` is {list(layers)}; it must name at least one block, and the model's blocks "
            f"are {blocks[0]} to {blocks[-1]}."
        )
    return set(layers)


def add_lora(
    model: nn.Module,
    *,
    layers: LayerChoice = DEFAULT_LAYERS,
    rank: int = 10,
    alpha: float = 10,
    target_modules: Sequence[str] | None = None,
) -> PeftModel:
    """Freeze a pretrained model and attach LoRA to the chosen layers, by peft.

    The classifier, where the model has one, is trained beside the adapter and saved with it.

    :param model: the pretrained model; it is changed in place, after all arguments were checked.
    :param layers: see :func:`find_adaptable_layers`.
    :param rank: rank of the factors A ``(rank, in)`` and B ``(out, rank)``.
    :param alpha: the adapter's output is scaled by ``alpha / rank``.
    :param target_modules: see :func:`find_adaptable_layers`.
    :return: the peft model around ``model``.
    :raises ValueError: if an argument is out of range or names no layer of the model.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, and is {rank}.")
    if alpha <= 0:
        raise ValueError(f"`alpha` must be positive, and is {alpha}.")
    names = find_adaptable_layers(model, layers, target_modules)
    classifier = classifier_name(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by r: any number does
        target_modules=names,
        modules_to_save=[classifier] if classifier else None,
    )
    # peft asks for one of transformers' models, and any module will do.
    return get_peft_model(model, config)  # type: ignore[arg-type, return-value, unused-ignore]


def classifier_name(model: nn.Module) -> str | None:
    """Name of a plain model's linear classifier: timm tells; else the usual names are tried."""
    get_classifier = getattr(model, "get_classifier", None)
    head: object = get_classifier() if callable(get_classifier) else None
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return str(name)
    usual = ("classifier", "score", "head", "fc")
    return next((n for n in usual if isinstance(getattr(model, n, None), nn.Linear)), None)


def find_classifier(model: nn.Module) -> nn.Linear | None:
    """The linear classifier that is in use: the trained copy where peft keeps one.

    :param model: a plain model, or one with LoRA; with or without a :class:`TrainableView`.
    :return: None where the model has no linear classifier.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            live = module.modules_to_save[module.active_adapters[0]]
            return live if isinstance(live, nn.Linear) else None
    plain = model.module if isinstance(model, TrainableView) else model
    name = classifier_name(plain)
    found = plain.get_submodule(name) if name else None
    return found if isinstance(found, nn.Linear) else None


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model by name, from the input side to the output side."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


class TrainableView(nn.Module):
    """A model seen through its trainable parameters alone.

    ``parameters()`` and ``named_parameters()`` yield only what requires a gradient, and a deep copy
    shares the frozen tensors and buffers. So strategies that keep something per parameter (EWC, SI,
    GEM) or copy the model (LwF) cost the size of the adapter and not that of the backbone.

    :param module: the model, usually a :class:`peft.PeftModel`.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of what is trained; see :meth:`torch.nn.Module.named_parameters`."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if parameter.requires_grad:
                yield name, parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableView:
        shared = [p for p in self.module.parameters() if not p.requires_grad]
        memo.update((id(tensor), tensor) for tensor in (*shared, *self.module.buffers()))
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
