"""Options of methods and scenarios, read from signatures and docstrings."""

import inspect
import json
import re

import pytest

from treelora_avalanche.registry import METHODS, SCENARIOS, RunSettings
from treelora_avalanche.registry.methods import SUPPLIED
from treelora_avalanche.registry.options import check_options, own_options, parameters_of
from treelora_avalanche.registry.settings import METHOD_SETTINGS
from treelora_avalanche.registry.streams import scenario_options
from treelora_avalanche.runs import resolve_config, run, run_name
from treelora_avalanche.runs.config import of_method
from treelora_avalanche.runs.setup import Ingredients, build_strategy
from treelora_avalanche.strategies import TreeLoRAStrategy


class Parent:
    """A parent.

    :param rate: the rate. More of it.
    """

    def __init__(self, *, model, rate: float = 0.5):
        pass


class Child(Parent):
    """A child.

    :param size: the size, see :class:`~some.module.Thing`.
    :param kind: ``"a"`` or ``"b"``; see elsewhere.
    """

    def __init__(self, model, *, size: int = 3, kind: str = "a", rate: float = 0.5, **kwargs):
        super().__init__(model=model, rate=rate)


def test_parameters_are_those_of_the_signature():
    assert list(parameters_of(Child)) == ["model", "size", "kind", "rate"]
    assert list(parameters_of(lambda a, *rest, b=1, **more: None)) == ["a", "b"]
    assert {"tree_lambda", "rank", "train_epochs"} <= set(parameters_of(TreeLoRAStrategy))


def test_options_have_defaults_types_and_one_sentence():
    """Parameters that the parent documents are documented there."""
    options = own_options(Child, {"model"})
    assert {name: (o.default, o.annotation, o.doc) for name, o in options.items()} == {
        "size": (3, int, "the size"),
        "kind": ("a", str, '"a" or "b"'),
        "rate": (0.5, float, "the rate"),
    }


@pytest.mark.parametrize(
    ("given", "expected"), [({"size": 4}, {"size": 4}), ({"rate": 1}, {"rate": 1.0}), ({}, {})]
)
def test_values_are_of_the_options_types(given, expected):
    checked = check_options("Child", given, own_options(Child, {"model"}))
    assert checked == expected
    assert [type(v) for v in checked.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"siez": 4}, r"option of Child should be one of .* but is 'siez'. Did you mean 'size'"),
        ({"size": "large"}, r"`size` of Child should be of type int, but is 'large'"),
        ({"rate": None}, r"`rate` of Child should be of type float, but is None"),
    ],
)
def test_wrong_options_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        check_options("Child", given, own_options(Child, {"model"}))


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_has_a_default_and_a_sentence(name):
    entry = METHODS[name]
    for option in entry.own_options().values():
        given = option.name in entry.options  # of an alias, the name of its parameter
        assert given or option.default is not inspect.Parameter.empty, option
        if not entry.strategy.startswith("avalanche."):
            assert re.match(r"\S+ .*[^.:]$", option.doc), option
    assert not set(entry.own_options()) & METHOD_SETTINGS
    # All parameters can be set: they are options, settings that the method reads, or the run's.
    reachable = {*entry.own_options(), *entry.aliases.values(), *entry.reads, *SUPPLIED}
    assert parameters_of(entry.strategy_class()).keys() <= reachable


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_option_of_every_scenario_has_a_default_and_a_sentence(name):
    for option in scenario_options(SCENARIOS[name]).values():
        assert option.default is not inspect.Parameter.empty, option
        assert re.match(r"\S+ .*[^.:]$", option.doc), option


# ----------------------------------------------------------------------------- in the settings


def with_options(**options):
    return RunSettings(method_options=options)


def test_options_of_a_method_change_no_other():
    settings = with_options(EWCLoRA={"ewc_lambda": 3.0, "lr": 0.25, "epochs": 7})
    own, rest = of_method("EWCLoRA", settings)
    assert (own.lr, own.epochs, rest) == (0.25, 7, {"ewc_lambda": 3.0})
    config = resolve_config("EWCLoRA", 0, settings)
    assert (config["lr"], config["epochs"]) == (0.25, 7)
    assert config["method_options"] == {"EWCLoRA": {"ewc_lambda": 3.0}}
    assert resolve_config("SeqLoRA", 0, settings) == resolve_config("SeqLoRA", 0, RunSettings())


def test_options_are_part_of_what_a_cell_is():
    def name(**options):
        return run_name(resolve_config("EWCLoRA", 0, with_options(EWCLoRA=options)))

    assert name(ewc_lambda=3.0) != name(ewc_lambda=4.0) != name()
    # A setting is the same, wherever it is given.
    assert name(lr=0.25) == run_name(resolve_config("EWCLoRA", 0, RunSettings(lr=0.25)))


def test_epochs_of_a_method_replace_those_of_each_task():
    settings = RunSettings(
        scenario="trace", data="x", model="y", method_options={"SeqLoRA": {"epochs": 2}}
    )
    assert settings.epochs_per_task == "equal"
    config = resolve_config("SeqLoRA", 0, settings)
    assert config["epochs"] == 2
    assert "epochs_per_task" not in config
    assert resolve_config("EWCLoRA", 0, settings)["epochs_per_task"] == "equal"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"EWCLora": {}}, "Did you mean 'EWCLoRA'"),
        ({"EWCLoRA": {"tree_lambda": 0.5}}, "of EWCLoRA should .* reads, but hold `tree_lambda`"),
        ({"EWCLoRA": {"lr": -1.0}}, "`--lr` should be a positive number"),
    ],
)
def test_wrong_options_are_named_before_anything_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_config("EWCLoRA", 0, with_options(**options))


def test_an_option_reaches_the_strategy(tiny_vit, tiny_benchmark):
    settings = with_options(
        EWCLoRA={"ewc_lambda": 3.0, "rank": 2}, LwF={"distillation_alpha": 0.25, "alpha": 3.0}
    )
    ingredients = Ingredients(0, tiny_benchmark, tiny_vit())

    def plugin(method, name):
        strategy = build_strategy(
            method, settings, ingredients, device="cpu", plugins=[], evaluator=None
        )
        return next(p for p in strategy.plugins if type(p).__name__ == name)

    assert plugin("EWCLoRA", "SampleFisherEWCPlugin").ewc_lambda == 3.0
    assert plugin("LwF", "LwFPlugin").lwf.alpha == 0.25
    assert plugin("LwF", "LwFPlugin").lwf.temperature == 2.0, "the row's own value"
    for method in ("SeqLoRA", "LwF", "Replay"):
        settings = with_options(**{method: {"merge": "ties"}})
        assert plugin(method, "MergedAdapterPlugin").merge == "ties"
    assert resolve_config("LwF", 0, RunSettings(merge="mean"))["merge"] == "mean"
    assert "merge" not in resolve_config("OLoRA", 0, RunSettings(merge="mean"))


def test_options_are_in_the_run_folder(tiny_vit, tiny_benchmark, tmp_path):
    settings = RunSettings(epochs=1, method_options={"SeqLoRA": {"schedule": "cosine"}})
    ingredients = Ingredients(0, tiny_benchmark, tiny_vit())
    results = run("SeqLoRA", 0, settings, tmp_path, ingredients=ingredients)
    assert results["config"]["method_options"] == {"SeqLoRA": {"schedule": "cosine"}}
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["config"] == results["config"]
