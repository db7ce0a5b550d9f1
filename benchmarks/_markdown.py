"""A Markdown page with one section per command that was run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.table import Table

from treelora_avalanche.provenance import git_hash, hardware, versions


def write_section(
    page: Path, script: str, tables: list[Table], missed: list[str], device: torch.device
) -> None:
    """Writes tables into the section of the current command; replaces that section if it exists.

    :param page: the page; its other sections are kept.
    :param script: path of the script in the repository.
    :param tables: the tables.
    :param missed: the missed targets.
    :param device: the device that was measured.
    """
    options = [o for o in sys.argv[1:] if o != "--check"]
    if "--write" in options:
        at = options.index("--write")
        del options[at : at + 2]
    heading = " ".join([f"## python {script}", *options])
    machine = {**hardware(device), **versions(), "commit": git_hash()}
    lines = [heading, "", ", ".join(f"{k} {v}" for k, v in machine.items() if v) + ".", ""]
    for table in tables:
        cells = [list(column.cells) for column in table.columns]
        lines += [f"**{table.title}**", "", _line(str(c.header) for c in table.columns)]
        lines.append(_line("---:" if c.justify == "right" else "---" for c in table.columns))
        lines += [*(_line(map(str, row)) for row in zip(*cells, strict=True)), ""]
    lines += [f"- Missed: {line}." for line in missed] or ["All targets are reached."]
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, *sections = re.split(r"(?m)^(?=## )", text)
    kept = [section for section in sections if section.splitlines()[0] != heading]
    parts = [part.strip() for part in (before, *kept, "\n".join(lines)) if part.strip()]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
