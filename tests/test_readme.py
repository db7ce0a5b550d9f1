"""The README and the pages of docs/: their examples run, their commands and links exist."""

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path

import pytest
import timm
import torch
from avalanche.training.templates import SupervisedTemplate
from transformers import LlamaConfig, LlamaForCausalLM

from treelora_avalanche import scenarios, strategies
from treelora_avalanche.cli import build_parser
from treelora_avalanche.models import LanguageModel, digits
from treelora_avalanche.models import pretrain_self_supervised as pretrain
from treelora_avalanche.registry.methods import METHODS
from treelora_avalanche.registry.scenarios import SCENARIOS
from treelora_avalanche.scenarios import TextTasks

REPOSITORY = Path(__file__).resolve().parent.parent
README = "README.md"
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)

PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in (
        REPOSITORY / README,
        *sorted((REPOSITORY / "docs").glob("*.md")),
        *(REPOSITORY / "benchmarks").glob("README.md"),
    )
}
BLOCKS = [(page, kind, body) for page, text in PAGES.items() for kind, body in FENCE.findall(text)]
EXAMPLES = [
    pytest.param(body, id=f"{page}-{number}")
    for number, (page, kind, body) in enumerate(BLOCKS)
    if kind == "python" and page not in (README, "docs/extending.md")  # see test_extension.py
]
MAKE = {
    "make demo": "treelora compare",
    "make demo-language": "examples/demo_language.py",
    "make test": "-m pytest",
    "make lint": "ruff check",
    "make bench": "benchmarks/stream_speed.py",
}
SHELL = ("cp -r $TREELORA_DATA/", "sed -i ")


def commands(page):
    """Commands of the console blocks, in the text, and of the headings above measured tables."""
    text = PAGES[page]
    consoles = [body for kind, body in FENCE.findall(text) if kind == "console"]
    lines = "".join(consoles).replace("\\\n", "").splitlines()
    prose = " ".join(FENCE.sub("", text).split())
    inline = re.findall(r"`((?:treelora|torchrun|make|python) [^`]+)`", prose)
    headings = re.findall(r"^#+ (python .+)$", text, re.MULTILINE)
    return [*lines, *inline, *headings]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def arguments_of_treelora(command):
    """Arguments of a call of `treelora`, also of one under torchrun."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        assert words[1:3] == ["--nproc_per_node", "2"]
        assert words[3:5] == ["-m", "treelora_avalanche.cli"]
        return words[5:]
    return words[1:]


@lru_cache
def help_of(script):
    """What a script prints for ``--help``; in this process, which has imported torch already."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend(str((REPOSITORY / script).parent))
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    assert not stopped.value.code
    return printed.getvalue()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("treelora", "torchrun"))])
def test_treelora_commands_parse(command, capsys):
    arguments = arguments_of_treelora(command)
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
    assert MAKE[command] in shown.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python")])
def test_scripts_explain_themselves(command):
    script, *words = shlex.split(command)[1:]
    shown = help_of(script)
    assert all(word in shown for word in words if word.startswith("--"))


@pytest.mark.parametrize("page", PAGES)
def test_no_command_is_left_untested(page):
    scripts = ("python benchmarks/", "python examples/", "python docs/figures/")
    known = ("treelora ", "torchrun ", "make ", "pip install -e .", *scripts)
    if page != README:
        known += SHELL
    assert [c for c in commands(page) if not c.startswith(known)] == []


def test_the_readme_names_what_ci_and_newcomers_run():
    assert {"make demo", "make test", "pip install -e ."} <= set(commands(README))


def test_every_benchmark_is_documented(repository):
    scripts = {path.name for path in (repository / "benchmarks").glob("[!_]*.py")}
    text = "".join(PAGES.values())
    assert {name for name in scripts if f"benchmarks/{name}" not in text} == set()


def test_the_readme_is_short():
    assert len(PAGES[README].splitlines()) <= 130


def _anchors(text):
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page, repository):
    text = FENCE.sub("", PAGES[page])
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r'(?:src|srcset|href)="([^"]+)"', text
    )
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (repository / page).parent / file if file else repository / page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", [README, "docs/methods.md"])
def test_every_strategy_is_named(page):
    assert [name for name in strategies.__all__ if f"`{name}`" not in PAGES[page]] == []


def test_every_method_is_named():
    assert [name for name in METHODS if f"`{name}`" not in PAGES["docs/methods.md"]] == []


@pytest.mark.parametrize("page", [README, "docs/scenarios.md"])
def test_every_benchmark_generator_is_named(page):
    generators = [name for name in scenarios.__all__ if name[0].isupper() and "_" not in name]
    assert generators
    assert [name for name in generators if f"`{name}`" not in PAGES[page]] == []


def test_every_scenario_is_named():
    assert [name for name in SCENARIOS if f"`{name}`" not in PAGES["docs/scenarios.md"]] == []


@pytest.mark.filterwarnings("ignore")
def test_quickstart_runs(monkeypatch):
    def refuse(*args):
        raise AssertionError("the quickstart needs no download")

    monkeypatch.setattr("socket.socket.connect", refuse)
    # A weaker backbone than the README's, in a tenth of the time.
    monkeypatch.setattr(digits, "pretrain_self_supervised", partial(pretrain, epochs=3))
    digits._pretrained.cache_clear()
    (quickstart,) = [body for page, kind, body in BLOCKS if page == README and kind == "python"]
    assert len([line for line in quickstart.splitlines() if line]) <= 10
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(quickstart, README, "exec"), names)
    digits._pretrained.cache_clear()
    strategy = names["strategy"]
    assert strategy.clock.train_exp_counter == len(strategy.tree) == 5
    metrics = strategy.evaluator.get_last_metrics()
    assert metrics["Top1_Acc_Stream/eval_phase/test_stream/Task000"] > 0.8


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
        return TextTasks(tmp_path, model, max_new_tokens=2, allow_overlap=True)

    return make


@pytest.fixture
def small(monkeypatch, tiny_benchmark, tiny_texts, tiny_vit, make_tokenizer):
    """Puts a stream and models that need no download behind the names of the examples."""

    def language_model(name, *, dtype):
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

    def model(name, *, pretrained, num_classes):
        assert timm.is_model(name)
        return tiny_vit(num_classes, depth=7)

    monkeypatch.setattr(timm, "create_model", model)
    package = "treelora_avalanche"
    monkeypatch.setattr(
        f"{package}.scenarios.SplitCIFAR100",
        lambda n_experiences, *, dataset_root, preprocessing: tiny_benchmark,
    )
    monkeypatch.setattr(
        f"{package}.scenarios.SplitDigits", lambda n_experiences, *, seed: tiny_benchmark
    )
    monkeypatch.setattr(f"{package}.scenarios.TRACE", tiny_texts)
    monkeypatch.setattr(f"{package}.models.create_language_model", language_model)
    monkeypatch.setattr(
        f"{package}.models.pretrained_digits_vit", lambda seed=0: tiny_vit(10, depth=7)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", EXAMPLES)
def test_python_examples_run(example, small, tiny_benchmark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(example, "docs", "exec"), names)
    strategy = names.get("strategy")
    if strategy is not None:
        assert isinstance(strategy, SupervisedTemplate)
        if "benchmark" not in names:
            strategy.train(tiny_benchmark.train_stream)
        assert strategy.clock.train_exp_counter == 3


def test_the_examples_are_found():
    assert len(EXAMPLES) >= 7


def test_the_picture_is_that_of_its_script(repository, tmp_path):
    def texts(path):
        return re.findall(r"<!-- (.+?) -->", path.read_text(encoding="utf-8"))

    main = runpy.run_path(str(repository / "docs" / "figures" / "method.py"))["main"]
    main(["--output", str(tmp_path)])
    for name in ("method_light.svg", "method_dark.svg"):
        drawn = texts(tmp_path / name)
        assert any("next batch" in text for text in drawn)
        assert drawn == texts(repository / "docs" / "figures" / name)


def test_the_tables_are_those_of_the_registry(repository):
    module = runpy.run_path(str(repository / "docs" / "tables.py"))
    for path, text in module["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, "run python docs/tables.py"
        assert text.count("| `") >= 10
