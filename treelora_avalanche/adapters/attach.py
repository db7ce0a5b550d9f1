"""Attach LoRA to a pretrained model with peft, and see the model through what is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from treelora_avalanche.adapters.classifier import classifier_name
from treelora_avalanche.choices import did_you_mean
from treelora_avalanche.defaults import LANGUAGE_LORA, VISION_LORA, LoRADefaults

LayerChoice = str | Sequence[int]


class AdapterHost(nn.Module):
    """A module around a network that peft adapts in its place, so that both can be used alone.

    ``host.network`` becomes the :class:`peft.PeftModel`, and what is saved of it loads onto the
    network without the host.
    """

    network: nn.Module
    lora_defaults = LANGUAGE_LORA
    task_type: str | None = "CAUSAL_LM"
    """Peft's name of what the network does, which it writes into the adapter's configuration."""


def find_host(model: nn.Module) -> AdapterHost | None:
    """The host in a model, itself or inside a view.

    :param model: any model.
    """
    return next((m for m in model.modules() if isinstance(m, AdapterHost)), None)


def lora_defaults(model: nn.Module) -> LoRADefaults:
    """What LoRA is for a model where the user says nothing.

    :param model: any model; it tells by an attribute ``lora_defaults``, and is else one of timm's.
    """
    defaults = getattr(model, "lora_defaults", VISION_LORA)
    return defaults if isinstance(defaults, LoRADefaults) else VISION_LORA


def find_adaptable_layers(
    model: nn.Module,
    layers: LayerChoice | None = None,
    target_modules: Sequence[str] | None = None,
) -> list[str]:
    """Names of the linear layers that LoRA is to adapt, from the input side to the output side.

    :param model: a transformer whose module names number its blocks (``blocks.7.attn.qkv``); or a
        :class:`AdapterHost` around one.
    :param layers: which blocks: ``"first:k"``, ``"last:k"`` (all of them where there are fewer than
        k), ``"all"``, or a sequence of block numbers; by default what suits the kind of model, see
        :data:`VISION_LORA` and :data:`LANGUAGE_LORA`.
    :param target_modules: ends of the names of the linear layers inside a block, such as
        ``("qkv", "attn.proj", "fc1", "fc2")``; by default what suits the kind of model: the fused
        ``qkv`` of timm's transformers, queries and values of language models.
    :return: the full module names, of a host those inside its network.
    :raises ValueError: if the model has no such layers, or ``layers`` does not name blocks of it.
    """
    defaults = lora_defaults(model)
    block_of: dict[str, int] = {}  # of every linear layer in a block, from the input side
    for name, module in _network(model).named_modules():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if isinstance(module, (nn.Linear, Conv1D)) and block is not None:
            block_of[name] = block
    if not block_of:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no linear layers in numbered blocks to adapt; "
            "pass a transformer such as timm's vit_base_patch16_224, or a PeftModel of your own."
        )

    def known_kind(kind: str) -> bool:
        return any(name.endswith(f".{kind}") for name in block_of)

    families = defaults.target_modules
    wanted = next((kinds for kinds in families if all(map(known_kind, kinds))), families[0])
    wanted = wanted if target_modules is None else tuple(target_modules)
    for kind in wanted:
        if not known_kind(kind):
            known = list(dict.fromkeys(name.split(".")[-1] for name in block_of))
            raise ValueError(
                f"`target_modules` names {kind!r}, which no linear layer of the model's blocks is "
                f"called. Known: {', '.join(known)}.{did_you_mean(kind, known)}"
            )
    candidates = [n for n in block_of if any(n.endswith(f".{kind}") for kind in wanted)]
    layers = defaults.layers if layers is None else layers
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
    layers: LayerChoice | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
) -> nn.Module:
    """Freeze a pretrained model and attach LoRA to the chosen layers, by peft.

    The classifier, where the model has one, is trained beside the adapter and saved with it. What
    is not given is chosen for the kind of model, see :data:`VISION_LORA` and
    :data:`LANGUAGE_LORA`.

    :param model: the pretrained model; it is changed in place, after all arguments were checked.
    :param layers: see :func:`find_adaptable_layers`.
    :param rank: rank of the factors A ``(rank, in)`` and B ``(out, rank)``.
    :param alpha: the adapter's output is scaled by ``alpha / rank``.
    :param target_modules: see :func:`find_adaptable_layers`.
    :return: the :class:`peft.PeftModel` around ``model``; of a :class:`AdapterHost`, itself.
    :raises ValueError: if an argument is out of range or names no layer of the model.
    """
    rank = lora_defaults(model).rank if rank is None else rank
    alpha = lora_defaults(model).alpha if alpha is None else alpha
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, and is {rank}.")
    if alpha <= 0:
        raise ValueError(f"`alpha` must be positive, and is {alpha}.")
    names = find_adaptable_layers(model, layers, target_modules)
    network = _network(model)
    classifier = classifier_name(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by r: any number does
        target_modules=names,
        modules_to_save=[classifier] if classifier else None,
        # GPT-2 keeps its weights transposed, and peft asks to be told.
        fan_in_fan_out=all(isinstance(network.get_submodule(name), Conv1D) for name in names),
        task_type=model.task_type if isinstance(model, AdapterHost) else None,
    )
    # peft asks for one of transformers' models, and any module will do.
    adapted = get_peft_model(network, config)  # type: ignore[arg-type, unused-ignore]
    if not isinstance(model, AdapterHost):
        return adapted
    model.network = adapted
    return model


def _network(model: nn.Module) -> nn.Module:
    return model.network if isinstance(model, AdapterHost) else model


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model by name, from the input side to the output side."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
