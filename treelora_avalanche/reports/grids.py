"""Tables of text cells, for the terminal and as Markdown; the first column names the rows."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def rich_grid(
    headers: Sequence[str], lines: Sequence[Sequence[str]], *, first: str = "Method"
) -> Table:
    """Returns a table for a terminal.

    :param headers: headers of the columns after the first.
    :param lines: the rows, each its name and its cells.
    :param first: header of the first column.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(first, style="bold", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def split_grid(headers: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> list[Table]:
    """Returns tables with as many columns each as the width allows, at least one.

    :param headers: headers of the columns after the first; without any there is no table.
    :param lines: the rows, each its name and its cells.
    :param width: width of the terminal in characters.
    """
    if not headers:
        return []
    n = len(headers)
    while n > 1 and grid_width(_part(headers, lines, n)) > width:
        n -= 1
    rest = [[line[0], *line[1 + n :]] for line in lines]
    return [_part(headers, lines, n), *split_grid(headers[n:], rest, width)]


def _part(headers: Sequence[str], lines: Sequence[Sequence[str]], n: int) -> Table:
    return rich_grid(headers[:n], [line[: 1 + n] for line in lines])


def grid_width(table: Table) -> int:
    """Returns the width of a table in characters.

    :param table: the table.
    """
    return Console(width=1000).measure(table).maximum


def markdown_grid(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a table as Markdown.

    :param headers: headers of the columns after the first.
    :param lines: the rows, each its name and its cells.
    """
    rows = [["Method", *headers], ["---", *("---:" for _ in headers)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


__all__ = ["grid_width", "markdown_grid", "rich_grid", "split_grid"]
