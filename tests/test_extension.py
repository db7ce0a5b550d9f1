"""A package of somebody else's, installed next to ours: the one of docs/extending.md."""

import json
import os
import re
import shutil
import subprocess
import sys
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


def treelora(environment, *arguments):
    """What a command prints, and its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "treelora_avalanche.cli", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_list_shows_rows_of_other_packages(installed):
    done = treelora(installed, "list")
    assert done.returncode == 0
    assert re.search(r"DecayLoRA +ours +vision +LoRA that decays towards", done.stdout)
    assert re.search(r"noisy_digits +vision +the digits under noise", done.stdout)
    # A fault of another package costs its own line.
    assert "Broken" not in done.stdout
    assert done.stderr.count("cannot be loaded") == 2
    assert "no_such_library" in done.stderr


def test_list_shows_options_of_other_packages(installed):
    done = treelora(installed, "list", "DecayLoRA")
    assert re.search(r"decay +0.01 +share of the way back after every optimizer step", done.stdout)
    done = treelora(installed, "list", "noisy_digits")
    assert re.search(r"noise +0.5 +standard deviation", done.stdout)
    done = treelora(installed, "list", "Broken")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no_such_library" in done.stderr


@pytest.mark.parametrize(
    "executor", [[], ["--executor", "processes", "--executor_options", "{workers: 2}"]]
)
def test_compare_runs_them_next_to_ours(installed, executor, tmp_path):
    done = treelora(
        installed,
        "compare",
        *("--scenario", "noisy_digits", "--scenario_options", "{noise: 0.2}"),
        *("--methods", "DecayLoRA", "TreeLoRA", "Broken", "--seeds", "0", "--epochs", "1"),
        *("--method_options", "{DecayLoRA: {decay: 0.5, lr: 0.001}}", "--output", tmp_path),
        *executor,
    )
    assert done.returncode == 1, "one method failed"
    assert "DecayLoRA (decay=0.5)" in done.stdout
    assert "lr 0.001 (TreeLoRA 0.005)" in done.stdout
    assert "1 of 3 runs failed" in done.stdout
    assert done.stderr.count("no_such_library") == 1
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")]
    by_method = {result["method"]: result for result in results}
    assert set(by_method) == {"DecayLoRA", "TreeLoRA"}
    config = by_method["DecayLoRA"]["config"]
    assert config["method_options"] == {"DecayLoRA": {"decay": 0.5}}
    assert config["scenario_options"] == {"noise": 0.2}
    assert config["lr"] == 0.001
    assert "| DecayLoRA (decay=0.5) |" in (tmp_path / "table.md").read_text()


def test_its_own_errors_are_one_line(installed, tmp_path):
    for options, message in (
        ("{DecayLoRA: {decay: 2.0}}", "`decay` should be from 0 to 1, but is 2.0"),
        ("{DecayLoRA: {decya: 0.5}}", "Did you mean 'decay'?"),
    ):
        done = treelora(
            installed,
            *("compare", "--scenario", "noisy_digits", "--methods", "DecayLoRA", "--seeds", "0"),
            *("--method_options", options, "--output", tmp_path / "out"),
        )
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------- the contract


def contract(environment, code):
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_it_keeps_the_contract(installed, repository):
    text = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from treelora_avalanche.testing .*?)```", text, re.DOTALL)
    done = contract(installed, code)
    assert done.returncode == 0, done.stderr


def test_the_contract_fails_a_strategy_that_reads_the_task_label(installed):
    done = contract(
        installed,
        "from treelora_avalanche.testing import check_strategy\n"
        "check_strategy('label_reader:make')",
    )
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
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
