"""Attaching LoRA to a pretrained model with peft."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from treelora_avalanche.adapters.classifier import classifier_names
from treelora_avalanche.adapters.first_pass import check_at_first_pass
from treelora_avalanche.adapters.other_libraries import check_not_torchvision
from treelora_avalanche.choices import check_known, did_you_mean
from treelora_avalanche.defaults import LANGUAGE_LORA, VISION_LORA, LoRADefaults

LayerChoice = str | Sequence[int]

PROJECTION_SWITCH = "qkv_bias_separate"
"""Attribute of timm's attention modules (BEiT, EVA, Swin V2). False: they multiply with the weight
of ``qkv`` and never call the layer, so that an adapter around it has no effect."""


class AdapterHost(nn.Module):
    """Module around a network that peft adapts instead of the module.

    ``host.network`` becomes the :class:`peft.PeftModel`, and its saved adapter loads onto the
    network without the host::

        class Host(AdapterHost):
            def __init__(self, network):
                super().__init__()
                self.network = network
    """

    network: nn.Module
    lora_defaults = LANGUAGE_LORA
    task_type: str | None = "CAUSAL_LM"
    """Peft's name of the network's task, written into the adapter's configuration."""


def find_host(model: nn.Module) -> AdapterHost | None:
    """Returns the host in a model, itself or inside a view; None if there is none.

    :param model: any model.
    """
    return next((m for m in model.modules() if isinstance(m, AdapterHost)), None)


def lora_defaults(model: nn.Module) -> LoRADefaults:
    """Returns the default hyper-parameters of LoRA for a model.

    :param model: any model; its attribute ``lora_defaults``, or else those of vision transformers.
    """
    defaults = getattr(model, "lora_defaults", VISION_LORA)
    return defaults if isinstance(defaults, LoRADefaults) else VISION_LORA


def find_adaptable_layers(
    model: nn.Module,
    layers: LayerChoice | None = None,
    target_modules: Sequence[str] | None = None,
) -> list[str]:
    """Returns the names of the linear layers for LoRA to adapt, from the input side to the output::

        find_adaptable_layers(vit, "last:2")  # ["blocks.10.attn.qkv", "blocks.11.attn.qkv"]

    :param model: a transformer whose module names number its blocks (``blocks.7.attn.qkv``); or a
        :class:`AdapterHost` around one.
    :param layers: the blocks: ``"first:k"``, ``"last:k"``, ``"all"``, or a sequence of block
        numbers; by default that of :data:`VISION_LORA` or :data:`LANGUAGE_LORA`, by the kind of
        model, or all blocks if there are fewer.
    :param target_modules: ends of the names of the linear layers inside a block, such as
        ``("qkv", "attn.proj", "fc1", "fc2")``, or of a module in it, such as ``("mlp",)``, for all
        linear layers in that; by default the ``qkv`` of timm's transformers (or
        ``q_proj``, ``k_proj``, ``v_proj``), and queries and values of language models.
    :return: the full module names; of a host, those inside its network.
    :raises ValueError: if the model has no such layers, or ``layers`` does not name blocks of it.
    """
    check_not_torchvision(model, target_modules)
    block_of = _linear_layers(model)
    _check_no_convolution(model, target_modules or (), block_of)
    defaults = lora_defaults(model)
    if target_modules is None:
        candidates = _default_targets(block_of, defaults)
    else:
        candidates = _named_targets(block_of, target_modules)
    blocks = sorted({block_of[name] for name in candidates})
    chosen = _default_blocks(defaults.layers, blocks) if layers is None else layers
    numbers = _choose_blocks(chosen, blocks)
    return [name for name in candidates if block_of[name] in numbers]


def _linear_layers(model: nn.Module) -> dict[str, int]:
    """Returns the block number of every linear layer in a block, from the input side."""
    block_of: dict[str, int] = {}
    for name, module in _network(model).named_modules():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if isinstance(module, (nn.Linear, Conv1D)) and block is not None:
            block_of[name] = block
    if not block_of:
        raise ValueError(
            "`model` should have linear layers in numbered blocks to adapt, but this "
            f"{type(model).__name__} has none. Pass a transformer such as timm's "
            "vit_base_patch16_224, or a PeftModel of your own."
        )
    return block_of


def _check_no_convolution(
    model: nn.Module, target_modules: Iterable[str], linear: Iterable[str]
) -> None:
    named = dict(_network(model).named_modules())
    for kind in target_modules:
        found = [m for name, m in named.items() if f".{name}".endswith(f".{kind}")]
        kinds = {type(m).__name__ for m in found if isinstance(m, _ConvNd)}
        if kinds and not any(isinstance(m, (nn.Linear, Conv1D)) for m in found):
            known = dict.fromkeys(name.split(".")[-1] for name in linear)
            raise ValueError(
                f"`target_modules` should name linear layers, but {kind!r} is a {kinds.pop()}. "
                f"Choose among {', '.join(known)}; for LoRA on convolutions, pass a PeftModel of "
                "your own."
            )


def _default_targets(names: Iterable[str], defaults: LoRADefaults) -> list[str]:
    """Returns the layers of the first default set that the model has."""
    names = list(names)
    families = defaults.target_modules
    for kinds in families:
        if all(_ending_in(kind, names) for kind in kinds):
            return [name for name in names if any(_ending_in(kind, [name]) for kind in kinds)]
    raise ValueError(
        f"`target_modules` should be given for this model, whose blocks have no layer "
        f"{' or '.join('+'.join(kinds) for kinds in families)}, but is None. Choose among "
        f"{', '.join(_last_parts(names))}."
    )


def _named_targets(names: Iterable[str], target_modules: Sequence[str]) -> list[str]:
    """Returns the layers with the given ends of names, or inside modules of a block so named."""
    names = list(names)
    found: set[str] = set()
    for kind in target_modules:
        own = _ending_in(kind, names) or _inside(kind, names)
        if not own:
            known = [*_last_parts(names), *_last_parts(n.rpartition(".")[0] for n in names)]
            known = [name for name in known if not name.isdigit()]
            check_known("every name in `target_modules`", kind, dict.fromkeys(known))
        found.update(own)
    return [name for name in names if name in found]


def _ending_in(kind: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(f".{kind}")]


def _inside(module: str, names: Iterable[str]) -> list[str]:
    # After the number of the block: "blocks.0.mlp.fc1" is inside mlp, and not inside blocks.
    return [name for name in names if f".{module}." in re.sub(r"^.*?\.\d+\b", "", name)]


def _last_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _default_blocks(layers: str, blocks: list[int]) -> str:
    """Returns the default, or ``"all"`` for a model with fewer blocks than it names."""
    k = layers.partition(":")[2]
    return "all" if k and int(k) > len(blocks) else layers


def _choose_blocks(layers: LayerChoice, blocks: list[int]) -> set[int]:
    if isinstance(layers, str):
        if layers == "all":
            return set(blocks)
        match = re.fullmatch(r"(first|last):([1-9]\d*)", layers)
        if match is None:
            raise ValueError(
                "`layers` should be 'first:k', 'last:k' (k at least 1), 'all', or a list of block "
                f"numbers, but is {layers!r}.{did_you_mean(layers, ('first:5', 'last:5', 'all'))}"
            )
        k = int(match[2])
        if k > len(blocks):
            raise ValueError(
                f"`layers` should name at most the model's {_number_of(blocks)}, but is "
                f"{layers!r}. Lower the number, or use 'all'."
            )
        return set(blocks[:k] if match[1] == "first" else blocks[-k:])
    unknown = [block for block in layers if block not in blocks]
    if unknown or not layers:
        raise ValueError(
            f"`layers` should name at least one of the model's {_number_of(blocks)}, "
            f"blocks {blocks[0]} to {blocks[-1]}, but is {list(layers)}."
        )
    return set(layers)


def _number_of(blocks: list[int]) -> str:
    return f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}"


def add_lora(
    model: nn.Module,
    *,
    layers: LayerChoice | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> nn.Module:
    """Freezes a pretrained model and attaches LoRA to some of its layers, with peft.

    The classifier, if the model has one, is trained with the adapter and saved with it, whatever
    its layers. Attention modules of timm that can call their projection as a layer do so from here
    on, see :func:`call_projections`. The first training pass, in any strategy, raises an error if a
    gradient does not reach every adapter, see
    :func:`~treelora_avalanche.adapters.first_pass.check_at_first_pass`. Defaults depend on the kind
    of model, see :data:`VISION_LORA` and :data:`LANGUAGE_LORA`::

        model = add_lora(create_vit("vit_base_patch16_224", num_classes=100), rank=4)

    :param model: the pretrained model; it is changed in place, after all arguments were checked.
    :param layers: see :func:`find_adaptable_layers`.
    :param rank: rank of the factors A ``(rank, in)`` and B ``(out, rank)``.
    :param alpha: scale of the adapter's output: ``W x + alpha / rank * B A x``.
    :param dropout: share of the adapter's inputs x that training sets to 0, in [0, 1).
    :param target_modules: see :func:`find_adaptable_layers`.
    :return: the :class:`peft.PeftModel` around ``model``; of a :class:`AdapterHost`, itself.
    :raises ValueError: if an argument is out of range or names no layer of the model.
    """
    rank = lora_defaults(model).rank if rank is None else rank
    alpha = lora_defaults(model).alpha if alpha is None else alpha
    if rank < 1:
        raise ValueError(f"`rank` should be at least 1, but is {rank}.")
    if alpha <= 0:
        raise ValueError(f"`alpha` should be positive, but is {alpha}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` should be at least 0 and below 1, but is {dropout}.")
    names = find_adaptable_layers(model, layers, target_modules)
    network = _network(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by r: any number does
        lora_dropout=dropout,
        target_modules=names,
        modules_to_save=classifier_names(model) or None,
        # GPT-2 stores its weights transposed, which peft does not detect.
        fan_in_fan_out=all(isinstance(network.get_submodule(name), Conv1D) for name in names),
        task_type=model.task_type if isinstance(model, AdapterHost) else None,
    )
    call_projections(network, names)
    # peft's annotation is for models of transformers, but any module works.
    adapted = get_peft_model(network, config)  # type: ignore[arg-type, unused-ignore]
    if not isinstance(model, AdapterHost):
        return check_at_first_pass(adapted)
    model.network = adapted
    return check_at_first_pass(model)


def call_projections(network: nn.Module, names: Iterable[str]) -> None:
    """Lets timm's attention modules call adapted projections, by :data:`PROJECTION_SWITCH`.

    The bias is then added to the layer's output; the outputs stay the same up to rounding. Modules
    without the switch are left as they are.

    :param network: the network that holds the layers.
    :param names: names of the adapted layers.
    """
    for name in names:
        attention: Any = network.get_submodule(name.rpartition(".")[0])
        if hasattr(attention, PROJECTION_SWITCH):
            attention.qkv_bias_separate = True


def _network(model: nn.Module) -> nn.Module:
    return model.network if isinstance(model, AdapterHost) else model


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Returns the LoRA layers of a model by name, from the input side to the output side.

    :param model: any model.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[None]:
    """Disables all LoRA layers inside the context, so that the model is the frozen one::

        with torch.no_grad(), disabled_adapters(model):
            model(images)  # as before LoRA was attached

    peft's ``disable_adapter`` would also disable the trained classifier.

    :param model: any model.
    """
    layers = list(lora_layers(model).values())
    # Disabling and enabling a layer sets which of its parameters are trained.
    trained = [(p, p.requires_grad) for layer in layers for p in cast(Any, layer).parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
