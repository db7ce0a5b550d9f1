"""The README's commands and examples do what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from avalanche.training.templates import SupervisedTemplate
from timm.models.vision_transformer import VisionTransformer

from treelora_avalanche.cli import build_parser

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
EXAMPLES = [text for kind, text in BLOCKS if kind == "python"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("treelora")])
def test_treelora_commands_parse(command, capsys):
    arguments = shlex.split(command)[1:]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stopped:
            build_parser().parse_args(arguments)
        assert stopped.value.code == 0
        assert "--methods" in capsys.readouterr().out
    else:
        assert build_parser().parse_args(arguments).command == arguments[0]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command, repository):
    shown = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {"make demo": "treelora compare", "make test": "-m pytest"}[command]
    assert expected in shown.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python")])
def test_benchmarks_explain_themselves(command, repository):
    script, *options = shlex.split(command)[1:]
    shown = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(option in shown.stdout for option in options)


def test_no_command_is_left_untested():
    known = ("treelora ", "make ", "python benchmarks/", "pip install -e .")
    assert COMMANDS
    assert [c for c in COMMANDS if not c.startswith(known)] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", EXAMPLES, ids=["strategy", "plugins"])
def test_python_examples_run(example, monkeypatch, tiny_benchmark):
    # The names of the example, on a stream and a model that need no download.
    def tiny_model(name, *, pretrained, num_classes):
        assert timm.is_model(name)
        return VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=6, num_heads=2
        )

    monkeypatch.setattr(timm, "create_model", tiny_model)
    monkeypatch.setattr(
        "treelora_avalanche.scenarios.SplitCIFAR100",
        lambda n_experiences, dataset_root: tiny_benchmark,
    )
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    strategy = names["strategy"]
    assert isinstance(strategy, SupervisedTemplate)
    if "benchmark" not in names:
        strategy.train(tiny_benchmark.train_stream)
    assert strategy.clock.train_exp_counter == 3
