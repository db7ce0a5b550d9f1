"""A package of somebody else's, installed next to ours: the one of docs/extending.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "extension"
BROKEN = {
    "setup.cfg": """[metadata]
name = broken-package
version = 0.1.0

[options]
py_modules =
    broken_package
    label_reader

[options.entry_points]
treelora_avalanche.methods =
    Broken = broken_package:METHOD
    LateBroken = broken_package:METHOD
""",
    "broken_package.py": "import no_such_library\n",
    "label_reader.py": """from my_continual.strategies import DecayLoRA


class LabelReader(DecayLoRA):
    def forward(self):
        return super().forward() + self.mb_task_id[:, None]


def make(model):
    return LabelReader(model=model, train_mb_size=8, train_epochs=1, evaluator=None)
""",
}


def install(source: Path, target: Path) -> None:
    """Installs a package into a folder, as pip does into site-packages."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    options = ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([*command, *options, str(source)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Environment of processes in which the package is installed, and a broken one."""
    root = tmp_path_factory.mktemp("extension")
    # Building writes into the source.
    shutil.copytree(SOURCE, root / "source")
    install(root / "source", root / "site")
    broken = root / "broken"
    broken.mkdir()
    for name, text in BROKEN.items():
        (broken / name).write_text(text)
    shutil.copy(SOURCE / "pyproject.toml", broken)
    install(broken, root / "site")
    path = os.pathsep.join(filter(None, [str(root / "site"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def compare(output, *options):
    return [
        *("compare", "--scenario", "noisy_digits", "--scenario_options", "{noise: 0.2}"),
        *("--methods", "DecayLoRA", "TreeLoRA", "Broken", "--seeds", "0", "--epochs", "1"),
        *("--method_options", "{DecayLoRA: {decay: 0.5, lr: 0.001}}", "--output", str(output)),
        *options,
    ]


def with_options(output, options):
    return [
        *("compare", "--scenario", "noisy_digits", "--methods", "DecayLoRA", "--seeds", "0"),
        *("--method_options", options, "--output", str(output)),
    ]


@dataclass
class Done:
    """Exit status of a call, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def done(installed, repository, tmp_path_factory):
    """Makes all calls in one new process, since imports take seconds; returns them by name."""
    folder = tmp_path_factory.mktemp("extension_calls")
    text = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from treelora_avalanche.testing .*?)```", text, re.DOTALL)
    processes = ["--executor", "processes", "--executor_options", "{workers: 2}"]
    calls = {
        "list": ["list"],
        **{name: ["list", name] for name in ("DecayLoRA", "noisy_digits", "Broken")},
        "sequential": compare(folder / "sequential"),
        "processes": compare(folder / "processes", *processes),
        "decay": with_options(folder / "out", "{DecayLoRA: {decay: 2.0}}"),
        "decya": with_options(folder / "out", "{DecayLoRA: {decya: 0.5}}"),
        "contract": code,
        "label reader": "from treelora_avalanche.testing import check_strategy\n"
        "check_strategy('label_reader:make')",
    }
    (folder / "calls.json").write_text(json.dumps(calls))
    subprocess.run(
        [sys.executable, Path(__file__).parent / "extension_calls.py", folder],
        env=installed,
        check=True,
    )
    results = json.loads((folder / "results.json").read_text())
    made = {name: Done(*result) for name, result in results.items()}
    for name in calls.keys() - {"contract", "label reader"}:
        assert "Traceback" not in made[name].stderr, made[name].stderr
    return folder, made


def test_list_shows_rows_of_other_packages(done):
    listed = done[1]["list"]
    assert listed.returncode == 0
    assert re.search(r"DecayLoRA +ours +vision +LoRA that decays towards", listed.stdout)
    assert re.search(r"noisy_digits +vision +the digits under noise", listed.stdout)
    # A fault of another package costs its own line.
    assert "Broken" not in listed.stdout
    assert listed.stderr.count("cannot be loaded") == 2
    assert "no_such_library" in listed.stderr


def test_list_shows_options_of_other_packages(done):
    _, made = done
    shown = made["DecayLoRA"].stdout
    assert re.search(r"decay +0.01 +share of the way back after every optimizer step", shown)
    assert re.search(r"noise +0.5 +standard deviation", made["noisy_digits"].stdout)
    broken = made["Broken"]
    assert broken.returncode == 2
    assert len(broken.stderr.splitlines()) == 1
    assert "no_such_library" in broken.stderr


@pytest.mark.parametrize("executor", ["sequential", "processes"])
def test_compare_runs_them_next_to_ours(done, executor):
    output, compared = done[0] / executor, done[1][executor]
    assert compared.returncode == 1, "one method failed"
    assert "DecayLoRA (decay=0.5)" in compared.stdout
    assert "lr 0.001 (TreeLoRA 0.005)" in compared.stdout
    assert "1 of 3 runs failed" in compared.stdout
    assert compared.stderr.count("no_such_library") == 1
    results = [json.loads(path.read_text()) for path in output.glob("*/results.json")]
    by_method = {result["method"]: result for result in results}
    assert set(by_method) == {"DecayLoRA", "TreeLoRA"}
    config = by_method["DecayLoRA"]["config"]
    assert config["method_options"] == {"DecayLoRA": {"decay": 0.5}}
    assert config["scenario_options"] == {"noise": 0.2}
    assert config["lr"] == 0.001
    assert "| DecayLoRA (decay=0.5) |" in (output / "table.md").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("decay", "`decay` should be from 0 to 1, but is 2.0"),
        ("decya", "Did you mean 'decay'?"),
    ],
)
def test_its_own_errors_are_one_line(done, option, message):
    failed = done[1][option]
    assert failed.returncode == 2
    assert message in failed.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------- the contract


def test_it_keeps_the_contract(done):
    kept = done[1]["contract"]
    assert kept.returncode == 0, kept.stderr


def test_the_contract_fails_a_strategy_that_reads_the_task_label(done):
    failed = done[1]["label reader"]
    assert failed.returncode != 0
    error = failed.stderr.strip().splitlines()[-1]
    assert "ContractError" in error
    assert "task label" in error


# --------------------------------------------------------------------------------- the document


def blocks(repository):
    """The files in docs/extending.md, by name."""
    text = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    return dict(re.findall(r"`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL))


def test_the_document_shows_the_package(repository):
    shown = blocks(repository)
    files = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*")
        if path.suffix in (".py", ".cfg") and path.name != "__init__.py"
    }
    assert set(shown) == files
    for name, text in shown.items():
        assert text == (SOURCE / name).read_text(encoding="utf-8"), name
