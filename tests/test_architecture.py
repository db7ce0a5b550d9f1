"""Who may import whom: downwards only."""

import ast
from pathlib import Path

import pytest

# Lower numbers lie deeper; a module may import from its own layer and from deeper ones.
LAYERS = {
    "defaults": 0,
    "registry": 4,
    "checkpoint": 3,
    "provenance": 0,
    "processes": 0,
    "choices": 0,
    "_version": 0,
    "tree": 0,
    "bandit": 0,
    "adapters": 1,
    "state": 1,
    "plugins": 2,
    "models": 2,
    "metrics": 2,
    "strategies": 3,
    "testing": 3,
    "scenarios": 3,
    "recipes": 4,
    "runs": 4,
    "compare": 5,
    "reports": 5,
    "cli": 6,
}
PURE = {
    "tree": {"torch", "rich", "treelora_avalanche.choices", "treelora_avalanche.tree"},
    "bandit": {"torch", "treelora_avalanche.tree"},
}


def package(repository: Path) -> Path:
    return repository / "treelora_avalanche"


def imports(file: Path, relative_to: Path) -> set[str]:
    """Full names of all modules that a file imports, relative imports resolved."""
    names = set()
    parents = ["treelora_avalanche", *file.relative_to(relative_to).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            names.add(".".join([*base, *([node.module] if node.module else [])]))
            if not node.module or node.module == "treelora_avalanche":
                names.discard("treelora_avalanche")
                names.update(
                    ".".join([*(base or ["treelora_avalanche"]), a.name]) for a in node.names
                )
    return names


def test_every_module_has_a_layer(repository):
    modules = {p.stem for p in package(repository).iterdir() if p.suffix == ".py" or p.is_dir()}
    assert modules - {"__init__", "__pycache__", "py"} == set(LAYERS)


def test_imports_point_downwards(repository):
    root = package(repository)
    wrong = []
    for file in root.rglob("*.py"):
        if file == root / "__init__.py":
            continue
        module = file.relative_to(root).parts[0].removesuffix(".py")
        for name in imports(file, root):
            parts = name.split(".")
            if parts[0] != "treelora_avalanche" or len(parts) < 2:
                continue
            if LAYERS[parts[1]] > LAYERS[module]:
                wrong.append(f"{file.relative_to(root)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("module", PURE)
def test_tree_and_bandit_stand_alone(repository, module):
    import sys

    root = package(repository)
    allowed = PURE[module] | sys.stdlib_module_names
    file = root / f"{module}.py"
    for part in [file] if file.is_file() else (root / module).glob("*.py"):
        for name in imports(part, root):
            top = ".".join(name.split(".")[:2])
            assert top in allowed or name.split(".")[0] in allowed, name


@pytest.mark.parametrize("name", ["strategies", "scenarios"])
def test_both_names_stand_at_the_top_level(repository, name):
    assert (repository / name).resolve() == package(repository) / name
