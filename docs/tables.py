"""Writes the tables of methods and scenarios into docs/, from the registry.

python docs/tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from treelora_avalanche.registry import METHODS, SCENARIOS

DOCS = Path(__file__).parent


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def methods() -> str:
    """The library's methods: name, class, description, models."""
    return table(
        ("name", "strategy", "what it is", "models"),
        [
            (
                f"`{name}`",
                f"`{row.strategy.partition(':')[2]}`"
                + ("" if row.strategy.startswith("treelora") else " of Avalanche"),
                row.description,
                ", ".join(sorted(row.models, reverse=True)),
            )
            for name, row in METHODS.data.items()
        ],
    )


def scenarios() -> str:
    """The library's scenarios: name, generator, description."""
    return table(
        ("`--scenario`", "generator", "what it is"),
        [
            (f"`{name}`", f"`{row.generator.partition(':')[2]}`", row.description)
            for name, row in SCENARIOS.data.items()
        ],
    )


def written(page: str, name: str, content: str) -> str:
    """A page with the table between its markers replaced."""
    begin, end = f"<!-- {name}: docs/tables.py -->", f"<!-- end of {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n\n{content}\n\n{end}", page, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """The pages with their tables, as they should be."""
    return {
        path: written(path.read_text(encoding="utf-8"), name, content())
        for path, name, content in (
            (DOCS / "methods.md", "methods", methods),
            (DOCS / "scenarios.md", "scenarios", scenarios),
        )
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
