"""Constructor arguments that the strategies share, and the signatures that show them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args, get_origin

import torch
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.optim import Optimizer
from typing_extensions import TypedDict, Unpack, is_typeddict

from treelora_avalanche.adapters import LayerChoice, find_host
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.choices import did_you_mean
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.strategies.base.defaults import OptimizerFactory
from treelora_avalanche.strategies.base.outputs import check_returns_logits


class TemplateOptions(TypedDict, total=False):
    """Arguments of :class:`avalanche.training.templates.SupervisedTemplate` that are kept as is."""

    eval_every: int
    peval_mode: str


class OwnHeadOptions(TemplateOptions, total=False):
    """Training arguments of methods that bring a head of their own."""

    optimizer: Optimizer | OptimizerFactory | None
    lr: float | None
    criterion: nn.Module | Callable[..., torch.Tensor] | None
    train_mb_size: int | None
    train_epochs: int | None
    eval_mb_size: int | None
    accumulation_steps: int
    schedule: str | None
    precision: str
    device: str | torch.device
    evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None


class TrainingOptions(OwnHeadOptions, total=False):
    """Arguments of :class:`ParameterEfficientStrategy`."""

    head: str


class OwnHeadLoRAOptions(OwnHeadOptions, total=False):
    """Arguments of LoRA methods that bring a head of their own."""

    rank: int | None
    alpha: float | None
    dropout: float
    layers: LayerChoice | None
    target_modules: Sequence[str] | None
    cache: int | str | None
    compile: bool


class UnmergedLoRAOptions(OwnHeadLoRAOptions, TrainingOptions, total=False):
    """Arguments of LoRA methods that combine the adapters of tasks in a way of their own."""


class LoRAOptions(UnmergedLoRAOptions, total=False):
    """Arguments of :class:`SeqLoRA`."""

    merge: str


class NamedArguments:
    """Mixin for strategies: a complete constructor signature, and ``model`` by position.

    A constructor declares ``**kwargs: Unpack[Options]`` for the arguments that it hands on to its
    parent, where ``Options`` is a TypedDict of their names. Static editors read the TypedDict;
    ``help()`` and :func:`inspect.signature` read the signature that this class sets: the
    constructor's own parameters, then those in ``Options`` with the parent's defaults. With
    ``**kwargs: Any`` it is all parameters of the parent. An unknown keyword is an error that names
    the nearest known one, raised before the constructor runs.

    Avalanche 0.6 wraps every constructor and warns of each parameter that may be positional.
    ``model``, which timm and transformers put first, is therefore handed on by keyword. That part
    can go when Avalanche no longer warns, see
    ``tests/strategies/test_strategies.py::test_avalanche_still_warns_of_positional_arguments``.

    Example::

        class MyMethod(SeqLoRA):
            def __init__(self, model, *, strength=1.0, plugins=None, **kwargs: Unpack[LoRAOptions]):
                plugins = [*(plugins or ()), MyPlugin(strength)]
                super().__init__(model, plugins=plugins, **kwargs)


        MyMethod(vit, strenght=2.0)  # TypeError: ... Did you mean `strength`?
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        own = vars(cls).get("__init__")
        if own is not None:
            signature = _complete_signature(cls, own)
            own.__signature__ = _keyword_only(signature)  # read by Avalanche's wrapper
        super().__init_subclass__(**kwargs)  # where Avalanche wraps the constructor
        if own is None:
            del cls.__init__  # an inherited constructor is wrapped already
        else:
            cls.__init__ = _with_named_arguments(cls.__init__, signature)  # type: ignore[method-assign]


def _complete_signature(cls: type, constructor: Callable[..., None]) -> inspect.Signature:
    """The signature of a constructor, ``**kwargs`` replaced by the parent's parameters."""
    try:
        declared = inspect.signature(constructor, eval_str=True)
    except NameError:  # a name is imported for type checkers alone
        declared = inspect.signature(constructor)
    own = {p.name: p for p in declared.parameters.values()}
    rest = next((own.pop(p.name) for p in [*own.values()] if p.kind is p.VAR_KEYWORD), None)
    inherited: dict[str, inspect.Parameter] = {}
    if rest is not None:
        parent = inspect.signature(super(cls, cls).__init__).parameters  # type: ignore[arg-type]
        names = _option_names(rest.annotation)
        inherited = {
            name: parameter
            for name, parameter in parent.items()
            if name not in own
            and parameter.kind is not parameter.VAR_KEYWORD
            and (names is None or name in names)
        }
    parameters = [*own.values(), *inherited.values()]
    positional = {next(iter(own)), "model"}  # self comes first
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arranged = [p.replace(kind=kinds[p.name in positional]) for p in parameters]
    return declared.replace(parameters=sorted(arranged, key=lambda p: p.kind))


def _option_names(annotation: Any) -> frozenset[str] | None:
    """The keys of the TypedDict in ``Unpack[...]``; None for any other annotation."""
    if get_origin(annotation) is not Unpack:
        return None
    (options,) = get_args(annotation)
    return frozenset(options.__annotations__) if is_typeddict(options) else None


def _keyword_only(signature: inspect.Signature) -> inspect.Signature:
    first, *others = signature.parameters.values()
    return signature.replace(
        parameters=[first, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in others)]
    )


def _with_named_arguments(
    constructor: Callable[..., None], signature: inspect.Signature
) -> Callable[..., None]:
    known = list(signature.parameters)[1:]

    @functools.wraps(constructor)
    def __init__(self: Any, model: nn.Module, **kwargs: Any) -> None:
        _check_names(type(self).__name__, kwargs, known)
        constructor(self, model=model, **kwargs)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


def _check_names(strategy: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known).replace("'", "`") or f" See help({strategy})."
            raise TypeError(f"`{name}` is not an argument of {strategy}.{hint}")


def check_image_model(model: nn.Module, method: str) -> None:
    """Raises an error for a model that is not a plain image model with one linear classifier.

    :param model: the model that a strategy received.
    :param method: name of the strategy.
    :raises ValueError: if it is a language model or a text encoder, or has no linear classifier.
    """
    if find_host(model) is not None:
        raise ValueError(
            f"`model` should be an image model with a classifier for {method}, but is a "
            f"{type(model).__name__}. Use one such as "
            "timm.create_model('vit_base_patch16_224')."
        )
    check_returns_logits(model)
    classifier_of(model)  # raises where there is none


def check_language_model(model: nn.Module, method: str) -> None:
    """Raises an error for a model that does not generate text.

    :param model: the model that a strategy received; it may be inside a view.
    :param method: name of the strategy.
    :raises ValueError: if there is no :class:`~treelora_avalanche.models.LanguageModel` in it.
    """
    if not isinstance(find_host(model), LanguageModel):
        raise ValueError(
            f"`model` should be a language model for {method}, but is a {type(model).__name__}. "
            "Make one with `treelora_avalanche.models.create_language_model`, or wrap a causal "
            "model of transformers as `LanguageModel(model, tokenizer)`."
        )
