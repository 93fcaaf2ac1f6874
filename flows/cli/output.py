"""How verbs print: tables for people, JSON for programs, errors in one voice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.home import Home

_WIDE = 240
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def home_path() -> Path:
    """Where all state lives: `LORALINE_HOME`, or `.loraline` in the working folder."""
    return Path(os.environ.get("LORALINE_HOME") or ".loraline")


def open_home() -> Home:
    """The home that all verbs on what is registered work with; it must be there.

    Raises:
        HomeError: There is none yet.
    """
    from registry.home import Home

    return Home.open(home_path(), create=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output; registry entities become plain objects, paths become texts."""
    from registry.entities import to_json

    print(json.dumps(to_json(value), indent=2, ensure_ascii=False, default=os.fspath))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """A table on standard output. Cells are text, never markup: what files say must not steer the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")  # a digest that is cut short is of no use
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    console = Console()
    # A file or a pipe is as wide as a row needs.
    (console if console.is_terminal else Console(width=_WIDE)).print(table)


def clean(cell: object) -> str:
    """The text of a cell without control characters; nothing for None."""
    text = "" if cell is None else str(cell)
    return "".join(character if character.isprintable() else "�" for character in text)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Aligned `label  value` lines; facts without a value are left out."""
    known = [(label, value) for label, value in facts if value not in (None, "", (), [])]
    width = max((len(label) for label, _ in known), default=0)
    for label, value in known:
        print(f"{label:<{width}}  {clean(value)}")


def explain(error: BaseException) -> None:
    """Words an error for a person on standard error: no traceback, the remedy included."""
    import errno

    text = str(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = (
            f"{error.filename or 'the disk'}: the disk is full. To do: free some space and run the same command again."
        )
    elif isinstance(error, OSError):
        text = f"{error.filename or 'the system'}: {error.strerror or error}."
    typer.echo(f"loraline: {text}", err=True)
