"""The constructors' signatures, and the arguments that all strategies share."""

import inspect
import pydoc
import warnings
from typing import get_args

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from typing_extensions import Unpack, get_type_hints

from treelora_avalanche import strategies
from treelora_avalanche.defaults import L2P_LR, LANGUAGE_TRAINING, VISION_TRAINING
from treelora_avalanche.strategies import L2P, SeqLoRA
from treelora_avalanche.strategies.base.arguments import LoRAOptions, TrainingOptions

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

ALL = {name: getattr(strategies, name) for name in strategies.__all__}
UNTRAINED = {"FrozenNCM", "FrozenGaussian", "FrozenRanPAC", "InContext"}
ONE_ADAPTER = {"SeqLoRA", "EWCLoRA", "GEMLoRA", "OGD", "L2Anchor", "OnPolicyReplay"}
OWN_HEAD = {"HiDePrompt", "HiDeLoRA", "RanPAC", "SLCA"}
TEXT_ONLY = {"SAPT", "TaSL", "InContext", "OnPolicyReplay"}
ON_IMAGES = sorted(ALL.keys() - TEXT_ONLY)
TRAINED_ON_IMAGES = sorted(ALL.keys() - TEXT_ONLY - UNTRAINED)
TRAINING = TrainingOptions.__annotations__.keys()
LORA = {name for name, strategy in ALL.items() if issubclass(strategy, SeqLoRA)}


def parameters(strategy_class):
    return inspect.signature(strategy_class).parameters


def default_of(name, parameter):
    return parameters(ALL[name])[parameter].default


@pytest.mark.parametrize("name", ALL)
def test_the_model_comes_first_and_all_else_is_named(name):
    first, *others = parameters(ALL[name]).values()
    assert (first.name, first.kind) == ("model", first.POSITIONAL_OR_KEYWORD)
    assert others
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in others)


@pytest.mark.parametrize("name", ALL)
def test_signatures_show_what_is_set_often(name):
    expected = {"plugins", "evaluator", "device", "eval_mb_size", "eval_every"}
    if name not in UNTRAINED:
        expected |= TRAINING - ({"head"} if name in OWN_HEAD else set())
    if name in LORA:
        expected |= LoRAOptions.__annotations__.keys() - {"head", "merge"}
    found = parameters(ALL[name]).keys()
    assert expected <= found
    assert ("merge" in found) == (name in ONE_ADAPTER)
    assert ("head" in found) == (name not in OWN_HEAD | UNTRAINED)


def classes_with_options():
    for strategy in ALL.values():
        for cls in strategy.__mro__:
            constructor = vars(cls).get("__init__")
            if constructor is not None and cls.__module__.startswith("treelora_avalanche"):
                yield pytest.param(cls, id=f"{strategy.__name__}-{cls.__name__}")


@pytest.mark.parametrize("cls", classes_with_options())
def test_the_typed_options_are_the_parameters_that_the_parent_takes(cls):
    """The TypedDict that editors read names real parameters, with the types they have."""
    hints = get_type_hints(inspect.unwrap(cls.__init__))
    unpacked = hints["kwargs"]
    assert unpacked.__origin__ is Unpack
    options = get_type_hints(get_args(unpacked)[0])
    parent = parameters(super(cls, cls).__init__)
    shown = parameters(cls)
    code = inspect.unwrap(cls.__init__).__code__
    own = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
    assert options.keys() <= parent.keys()
    assert options.keys().isdisjoint(own)
    assert shown.keys() == {"model", *own, *options}
    for option, kind in options.items():
        assert shown[option].default == parent[option].default
        declared = parent[option].annotation
        assert declared in (inspect.Parameter.empty, kind), option


@pytest.mark.parametrize("name", ON_IMAGES)
def test_defaults_are_those_that_are_used(tiny_vit, name):
    """Building with every default given by name is building with none."""
    given = {p.name: p.default for p in parameters(ALL[name]).values() if p.default is not p.empty}
    built = []
    for options in ({}, given):
        torch.manual_seed(0)
        built.append(ALL[name](tiny_vit(depth=5), **options))
    first, second = (
        {
            "sizes": (s.train_mb_size, s.train_epochs, s.eval_mb_size),
            "plugins": [type(plugin) for plugin in s.plugins],
            "weights": {n: p.sum().item() for n, p in s.model.named_parameters()},
            "optimizer": (type(s.optimizer), s.optimizer.param_groups[0]["lr"]),
            "device": s.device,
        }
        for s in built
    )
    assert first == second


@pytest.mark.parametrize("name", TRAINED_ON_IMAGES)
def test_none_stands_for_the_documented_default(tiny_vit, name):
    strategy = ALL[name](tiny_vit(depth=5), evaluator=None)
    assert default_of(name, "train_epochs") is default_of(name, "lr") is None
    assert strategy.train_epochs == VISION_TRAINING.train_epochs
    assert strategy.train_mb_size == VISION_TRAINING.train_mb_size
    assert strategy.eval_mb_size == VISION_TRAINING.eval_mb_size
    expected = L2P_LR if name == "L2P" else VISION_TRAINING.lr
    assert strategy.optimizer.param_groups[0]["lr"] == expected


@pytest.mark.parametrize("name", ["TreeLoRAStrategy", "L2P", "FrozenNCM"])
def test_help_shows_the_arguments(name):
    text = pydoc.plain(pydoc.render_doc(ALL[name]))
    for parameter in parameters(ALL[name]):
        assert f"{parameter}:" in text or f"{parameter}=" in text
    assert "**kwargs" not in text.split("__init__(")[1].split("\n")[0]


# ---------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize("name", TRAINED_ON_IMAGES)
def test_lr_is_that_of_the_default_optimizer(tiny_vit, name):
    default = type(ALL[name](tiny_vit(depth=5), evaluator=None).optimizer)
    strategy = ALL[name](tiny_vit(depth=5), lr=0.02, evaluator=None)
    assert type(strategy.optimizer) is default
    rates = {0.02, 0.0002} if name == "SLCA" else {0.02}  # its backbone learns slowly
    assert {group["lr"] for group in strategy.optimizer.param_groups} == rates


def test_lr_of_a_language_model_keeps_its_optimizer(make_language_model):
    strategy = SeqLoRA(make_language_model(), lr=0.02, evaluator=None)
    assert type(strategy.optimizer).__name__ == LANGUAGE_TRAINING.optimizer
    group = strategy.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0)


@pytest.mark.parametrize("name", TRAINED_ON_IMAGES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1, "optimizer": torch.optim.SGD}, "`lr` should be left out where `optimizer`"),
        ({"lr": 0.0}, "`lr` should be above 0, but is 0.0"),
        ({"lr": -1.0}, "`lr` should be above 0, but is -1.0"),
        ({"lr": float("nan")}, "`lr` should be above 0, but is nan"),
    ],
)
def test_a_wrong_lr_is_refused_before_the_model_is_touched(tiny_vit, name, options, message):
    model = tiny_vit(depth=5)
    with pytest.raises(ValueError, match=message):
        ALL[name](model, **options)
    assert type(model) is VisionTransformer
    assert all(p.requires_grad for p in model.parameters())


def test_lr_next_to_an_optimizer_that_is_made_already_is_refused(tiny_vit):
    model = SeqLoRA(tiny_vit(depth=5), evaluator=None).model
    with pytest.raises(ValueError, match="Set the learning rate in the optimizer"):
        SeqLoRA(model, lr=0.1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


# ---------------------------------------------------------------------------- unknown arguments


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_argument_is_refused_with_the_nearest_one(tiny_vit, name):
    model = tiny_vit(depth=5)
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(
        TypeError, match=f"`eval_mb_sise` is not an argument of {name}.*`eval_mb_size`"
    ):
        ALL[name](model, eval_mb_sise=3)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before


def test_the_nearest_argument_may_be_inherited(tiny_vit):
    with pytest.raises(TypeError, match="Did you mean `train_epochs`\\?"):
        L2P(tiny_vit(depth=5), train_epoch=3)


def test_nothing_is_suggested_where_nothing_is_near(tiny_vit):
    with pytest.raises(TypeError, match=r"`xyzzy` is not an argument of L2P\. See help\(L2P\)\."):
        L2P(tiny_vit(depth=5), xyzzy=3)


@pytest.mark.parametrize("name", sorted(OWN_HEAD))
def test_a_method_with_a_head_of_its_own_takes_none(tiny_vit, name):
    with pytest.raises(TypeError, match="`head` is not an argument"):
        ALL[name](tiny_vit(depth=5), head="linear")


# ---------------------------------------------------------------------------- other people's


class WithOptions(SeqLoRA):
    def __init__(
        self, model, *, strength: float = 2.0, plugins=None, **kwargs: Unpack[LoRAOptions]
    ):
        self.strength = strength
        super().__init__(model, plugins=plugins, **kwargs)


class WithoutTypes(SeqLoRA):
    def __init__(self, *, model, strength: "Unknown" = 2.0, **kwargs):  # noqa: F821
        self.strength = strength
        super().__init__(model=model, **kwargs)


class WithoutConstructor(SeqLoRA):
    pass


@pytest.mark.parametrize("cls", [WithOptions, WithoutTypes, WithoutConstructor])
def test_a_subclass_gets_its_signature(tiny_vit, cls):
    own = set() if cls is WithoutConstructor else {"strength"}
    assert parameters(cls).keys() == parameters(SeqLoRA).keys() | own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="No loggers specified")
        strategy = cls(tiny_vit(depth=5), lr=0.02, evaluator=None)
        cls(model=tiny_vit(depth=5), evaluator=None)
    assert strategy.optimizer.param_groups[0]["lr"] == 0.02
    with pytest.raises(TypeError, match=f"`rnk` is not an argument of {cls.__name__}.*`rank`"):
        cls(tiny_vit(depth=5), rnk=3)
    with pytest.raises(TypeError, match="positional argument"):
        cls(tiny_vit(depth=5), 3)
    with pytest.raises(TypeError, match="'model'"):
        cls()
