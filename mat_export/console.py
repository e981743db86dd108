"""What the command line shows: tables, steps and progress, on a terminal and elsewhere.

Results go to standard output, everything about the work itself to standard error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["err", "note", "out", "show_facts", "show_table", "tracker"]

_WIDTH_OF_A_FILE = 160
"""Columns where the output is no terminal, so that tables in logs stay whole."""


def out() -> Console:
    """Standard output."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_A_FILE)


def err() -> Console:
    """Standard error."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        return console
    return Console(stderr=True, highlight=False, width=_WIDTH_OF_A_FILE, soft_wrap=True)


def note(message: str) -> None:
    """A line about the work, on standard error."""
    err().print(message, markup=False)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; columns of figures are aligned right."""
    table = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        cells = [row[i] for row in rows]
        figures = i > 0 and all(cell[:1] in "0123456789–∞." for cell in cells)
        table.add_column(column, justify="right" if figures else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # brackets are themselves, not markup
    out().print(table)


def show_facts(facts: dict[str, str]) -> None:
    """Names and values, one a line, on standard output."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, Text(value))
    out().print(grid)


@contextlib.contextmanager
def tracker(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (what, done, total): a bar on a terminal, else plain lines."""
    console = err()
    if not console.is_terminal:
        yield lambda name, done, total: note(
            f"{label} {min(done + 1, total)}/{total}: {name}" if done < total else f"{label}: done"
        )
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda name, done, total: progress.update(
            task, description=f"{label}: {name}", completed=done, total=total
        )
