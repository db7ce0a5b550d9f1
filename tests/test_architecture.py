"""Imports point downwards: the chain of layers, one a line."""

import ast
import sys
from pathlib import Path

import pytest

# Highest first. A layer imports from lower ones only.
CHAIN = (
    "cli",
    "tune",
    "evaluate",
    "compare",
    "reports",
    "runs",
    "registry",
    "recipes",
    "testing",
    "strategies",
    "scenarios",
    "checkpoint",
    "metrics",
    "plugins",
    "models",
    "adapters",
    "state",
    "bandit",
    "tree",
    "experiences",
    "processes",
    "provenance",
    "defaults",
    "plain_text",
    "choices",
    "_version",
)
HEIGHT = {name: -line for line, name in enumerate(CHAIN)}
PURE = {  # what these may import apart from the standard library
    "tree": {"torch", "rich", "treelora_avalanche.choices", "treelora_avalanche.tree"},
    "bandit": {"torch", "treelora_avalanche.choices", "treelora_avalanche.tree"},
    "choices": set(),
    "defaults": set(),
}


def package(repository: Path) -> Path:
    return repository / "treelora_avalanche"


def files_of(root: Path, layer: str) -> list[Path]:
    file = root / f"{layer}.py"
    return [file] if file.is_file() else sorted((root / layer).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Full names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import in line {node.lineno}"
            module = node.module or ""
            if module == "treelora_avalanche":
                names.update(f"{module}.{alias.name}" for alias in node.names)
            else:
                names.add(module)
    return names


def layers_of(file: Path) -> set[str]:
    """Layers of this package that a file imports."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("treelora_avalanche.")}


def test_every_module_has_a_layer(repository):
    modules = {p.stem for p in package(repository).iterdir() if p.suffix == ".py" or p.is_dir()}
    assert modules - {"__init__", "__pycache__", "py"} == set(HEIGHT)


@pytest.mark.parametrize("layer", HEIGHT)
def test_imports_point_downwards(repository, layer):
    root = package(repository)
    wrong = [
        f"{file.relative_to(root)} imports {other}"
        for file in files_of(root, layer)
        for other in layers_of(file) - {layer, "_version"}
        if HEIGHT[other] >= HEIGHT[layer]
    ]
    assert not wrong


@pytest.mark.parametrize("layer", PURE)
def test_the_mathematics_stand_alone(repository, layer):
    allowed = PURE[layer] | sys.stdlib_module_names
    for file in files_of(package(repository), layer):
        for name in imports(file):
            top = ".".join(name.split(".")[:2])
            assert top in allowed or name.split(".")[0] in allowed, f"{file} imports {name}"


def test_baselines_are_not_needed_by_other_plugins(repository):
    plugins = package(repository) / "plugins"
    for file in plugins.rglob("*.py"):
        if "baselines" not in file.parts and file.name != "__init__.py":
            assert not [name for name in imports(file) if ".baselines" in name], file


@pytest.mark.parametrize("name", ["strategies", "scenarios"])
def test_both_names_stand_at_the_top_level(repository, name):
    assert (repository / name).resolve() == package(repository) / name
