"""Lists of values in a comparison: one row per combination."""

import json

import pytest

from treelora_avalanche import models, scenarios
from treelora_avalanche.cli import main
from treelora_avalanche.compare import expand_options
from treelora_avalanche.registry import RunSettings
from treelora_avalanche.reports import figures


@pytest.fixture
def tiny_digits(monkeypatch, tiny_benchmark, tiny_vit):
    """Replaces the digits and their backbone by a tiny stream and model."""
    monkeypatch.setattr(scenarios, "SplitDigits", lambda n_experiences, seed: tiny_benchmark)
    monkeypatch.setattr(models, "pretrained_digits_vit", lambda seed: tiny_vit())


@pytest.mark.usefixtures("tiny_digits")
def test_every_combination_is_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "write_figures", lambda *_: [])
    arguments = ["compare", "--methods", "TreeLoRA", "SeqLoRA", "--seeds", "0", "--device", "cpu"]
    arguments += ["--epochs", "1", "--layers", "last:1", "--rank", "2", "--output", str(tmp_path)]
    assert main([*arguments, "--tree_lambda", "[0.1, 0.7]"]) == 0
    printed = capsys.readouterr()
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    names = ["TreeLoRA (tree_lambda=0.1)", "TreeLoRA (tree_lambda=0.7)", "SeqLoRA"]
    assert [row["method"] for row in rows] == names  # SeqLoRA does not read it: one row
    assert [f"{name}, seed 0: done" in printed.err for name in names] == [True] * 3
    values = {
        results["method"]: results["config"].get("tree_lambda")
        for results in map(json.loads, (f.read_text() for f in tmp_path.glob("*/results.json")))
        if results["config"].get("tree_lambda") != 0.1
    }
    assert values == {"TreeLoRA": 0.7, "SeqLoRA": None}
    # One value of the list is the same run as without a list.
    assert main([*arguments, "--tree_lambda", "0.7"]) == 0
    assert capsys.readouterr().err.count("finished before") == 2


def test_options_of_one_method_are_combined():
    settings = RunSettings(
        method_options={
            "EWCLoRA": {"ewc_lambda": [1.0, 100.0], "rank": [2, 4]},
            "DualPrompt": {"expert_layers": [2, 3]},
            "OLoRA": {"layers": [0, 1]},
        }
    )
    points = [point.method_options for point in expand_options(settings)]
    assert [point["EWCLoRA"] for point in points] == [
        {"ewc_lambda": strength, "rank": rank} for strength in (1.0, 100.0) for rank in (2, 4)
    ]
    for point in points:  # options that take a list keep it
        assert point["DualPrompt"] == {"expert_layers": [2, 3]}
        assert point["OLoRA"] == {"layers": [0, 1]}


def test_settings_without_lists_stay():
    settings = RunSettings(method_options={"EWCLoRA": {"ewc_lambda": 1.0}})
    assert expand_options(settings) == [settings]
    assert expand_options(RunSettings()) == [RunSettings()]


def test_empty_list_is_an_error(tmp_path, capsys):
    assert main(["compare", "--lr", "[]", "--output", str(tmp_path)]) == 2
    assert "`--lr` should be a value or a list of values, but is []" in capsys.readouterr().err
