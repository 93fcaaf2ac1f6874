"""Prints the output of verbs: tables, facts, JSON and errors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.completion import complete_adapters

_WIDE = 240
BASE_HELP = "Base model: a published one such as sdxl (list: docs/families.md), tiny, a folder or a hub id."
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str | None, typer.Option(help="Output dtype: float32, float16 or bfloat16. Default: unchanged.")]
Approximate = Annotated[bool, typer.Option(help="Approximate kinds that FORMAT cannot hold by LoRA.")]
Ref = Annotated[
    str,
    typer.Argument(metavar="NAME@REF", help="name@version or name@alias.", autocompletion=complete_adapters),
]
Reason = Annotated[str, typer.Option(help="Reason, stored in the log.")]
Expect = Annotated[
    str | None,
    typer.Option(metavar="VERSION|DIGEST", help="Number or sha256 of the reviewed version; refuse any other."),
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Output file or folder.")]
Rank = Annotated[int | None, typer.Option(min=1, help="Maximum rank (with --approximate).")]
Energy = Annotated[float | None, typer.Option(help="Share of the squared norm to keep, up to 1 (with --approximate).")]


def print_json(value: Any) -> None:
    """Prints one JSON document; registry entities become objects, paths become strings; secrets are hidden."""
    from registry.entities import to_json
    from registry.store.redaction import redact_values

    print(json.dumps(redact_values(to_json(value)), indent=2, ensure_ascii=False, default=os.fspath))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Prints a table. Cells are plain text, so that the content of files cannot control the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")  # a truncated digest is useless
    cleaned: dict[str, str] = {}  # a long table repeats names, aliases and dates
    for row in rows:
        for cell in row:
            if isinstance(cell, str) and cell not in cleaned:
                cleaned[cell] = clean(cell)
        table.add_row(*(Text(cleaned[cell] if isinstance(cell, str) else clean(cell)) for cell in row))
    console = Console()
    # A file or a pipe has no width of its own.
    (console if console.is_terminal else Console(width=_WIDE)).print(table)


def clean(cell: object) -> str:
    """Returns the text of a cell without control characters and secrets; an empty string for None, JSON for lists."""
    from registry.store.redaction import redact
    from tasks.operations.changes import show_value

    is_json = isinstance(cell, (bool, list, tuple, dict))
    text = "" if cell is None else redact(show_value(cell) if is_json else str(cell))
    return "".join(character if character.isprintable() else "�" for character in text)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Prints aligned `label  value` lines; skips facts without a value."""
    known = [(label, value) for label, value in facts if value not in (None, "", (), [])]
    width = max((len(label) for label, _ in known), default=0)
    for label, value in known:
        print(f"{label:<{width}}  {clean(value)}")


def explain(error: BaseException) -> None:
    """Prints an error and its remedy on standard error, without a traceback and without secrets."""
    import errno

    from registry.store.redaction import redact

    text = str(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = f"{error.filename or 'the disk'}: the disk is full. Fix: free some space and run the command again."
    elif isinstance(error, OSError):
        text = f"{error.filename or 'the system'}: {error.strerror or error}."
    typer.echo(f"loraline: {redact(text)}", err=True)
