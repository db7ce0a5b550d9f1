"""The README's commands and examples do what they say."""

import json
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
from transformers import LlamaConfig, LlamaForCausalLM

from treelora_avalanche.cli import build_parser
from treelora_avalanche.models import LanguageModel
from treelora_avalanche.scenarios import TextTasks

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for kind, text in BLOCKS
    if kind == "console"
    for line in text.replace("\\\n", "").splitlines()
]
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


@pytest.fixture
def tiny_texts(tmp_path):
    """Makes three tasks of text in place of TRACE."""
    for name in ("up", "down", "left"):
        (tmp_path / name).mkdir()
        records = [{"prompt": f"{name} {n}:", "answer": str(n)} for n in range(4)]
        for part in ("train", "test"):
            (tmp_path / name / f"{part}.json").write_text(json.dumps(records))

    def make(data_root, model, variant):
        assert variant in ("500", "1000", "5000")
        return TextTasks(tmp_path, model, max_new_tokens=2)

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "example", EXAMPLES, ids=["strategy", "first session", "plugins", "language"]
)
def test_python_examples_run(example, monkeypatch, tiny_benchmark, tiny_texts, make_tokenizer):
    # The names of the example, on a stream and a model that need no download.
    def tiny_language_model(name, *, dtype):
        assert hasattr(torch, dtype)
        config = LlamaConfig(
            vocab_size=98,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        return LanguageModel(LlamaForCausalLM(config), make_tokenizer())

    def tiny_model(name, *, pretrained, num_classes):
        assert timm.is_model(name)
        return VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=7, num_heads=2
        )

    monkeypatch.setattr(timm, "create_model", tiny_model)
    monkeypatch.setattr(
        "treelora_avalanche.scenarios.SplitCIFAR100",
        lambda n_experiences, dataset_root: tiny_benchmark,
    )
    monkeypatch.setattr("treelora_avalanche.models.create_language_model", tiny_language_model)
    monkeypatch.setattr("treelora_avalanche.scenarios.TRACE", tiny_texts)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    strategy = names["strategy"]
    assert isinstance(strategy, SupervisedTemplate)
    if "benchmark" not in names:
        strategy.train(tiny_benchmark.train_stream)
    assert strategy.clock.train_exp_counter == 3
