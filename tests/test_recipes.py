"""Shipped recipes: each is complete and runs as it is, given its weights."""

import huggingface_hub
import pytest
import yaml

from treelora_avalanche.cli import build_parser, main
from treelora_avalanche.recipes import RECIPES, describe_recipe
from treelora_avalanche.registry.methods import check_models
from treelora_avalanche.registry.settings import SCENARIOS, RunSettings
from treelora_avalanche.runs.config import resolve_config

SETTINGS = set(RunSettings.__dataclass_fields__)


def read(name):
    return yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))


def settings(name):
    return RunSettings(**{k: v for k, v in read(name).items() if k in SETTINGS})


def test_every_table_of_language_models_has_a_recipe():
    models = {read(name)["model"] for name in RECIPES if name.startswith("table_03")}
    assert models == {
        "mistralai/Mistral-7B-Instruct-v0.3",
        "meta-llama/Llama-2-7b-chat-hf",
        "google/gemma-2b-it",
        "meta-llama/Llama-3.2-1B-Instruct",
    }
    others = [name.split("_")[1] for name in RECIPES if not name.startswith("table_03")]
    assert others == ["04", "05", "07", "09", "10", "13"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_valid_comparison(name):
    recipe = read(name)
    options = build_parser().parse_args(["compare", "--config", str(RECIPES[name])])["compare"]
    assert {key: options[key] for key in recipe} == recipe
    check_models(recipe["methods"], settings(name))
    assert SCENARIOS[recipe["scenario"]].language
    assert "TreeLoRA-last" in recipe["methods"]
    assert recipe["output"] == f"runs/{name}"
    # Hyper-parameters of language models in the paper (A.3).
    for method in recipe["methods"]:
        config = resolve_config(method, 0, settings(name))
        assert config["max_length"] == 1024
        assert config["chat_template"] is False
        if "batch_size" in config:  # of the released scripts: 1 on each of 4 GPUs, 8 accumulated
            assert config["batch_size"] * config["accumulation_steps"] == 32
        if "rank" in config:  # neither prompts nor demonstrations
            assert config["dropout"] == 0.1
            assert (config["rank"], config["alpha"], config["lr"]) == (8, 32, 1e-4)
        if method == "TreeLoRA-last":
            assert config["tree_lambda"] == 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_states_its_table(name):
    comment = [line for line in RECIPES[name].read_text().splitlines() if line.startswith("#")]
    assert describe_recipe(RECIPES[name]) == comment[0].lstrip("# ")
    assert comment[0].startswith(f"# Table {int(name.split('_')[1])}")


def test_recipes_name_missing_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in RECIPES:
        arguments = ["compare", "--config", name, "--data", tmp_path, "--output", tmp_path / "runs"]
        assert main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("treelora: error: ")
        assert read(name)["model"] in captured.err
        assert "folder" in captured.err
    assert not (tmp_path / "runs").exists()


def test_recipes_are_listed(capsys):
    assert main(["list", "recipes"]) == 0
    printed = capsys.readouterr().out
    for name in RECIPES:
        assert name in printed
    assert "JointTraining" not in printed
    assert str(next(iter(RECIPES.values())).parent) in printed.replace("\n", "")


def test_recipes_are_known_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def resolved(*arguments):
        with pytest.raises(SystemExit, match="0"):
            main(["compare", *arguments, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    for arguments in (["--config", "table_04_depth"], ["--config=table_04_depth"]):
        config = resolved(*arguments, "--layers", "last:4")
        assert config["model"] == "meta-llama/Llama-2-7b-chat-hf"
        assert config["layers"] == "last:4"
    # A file of this name takes precedence.
    (tmp_path / "table_04_depth").write_text("rank: 3\n")
    assert resolved("--config", "table_04_depth")["rank"] == 3
