"""Defines the verb `lineage`: shows upstream or downstream lineage as a table, JSON, events or a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.output import Json, open_home
from flows.cli.verbs import Access, add_verb


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verb to the command."""
    add_verb(app, Access.READ, lineage)


def lineage(
    ref: Annotated[
        str,
        typer.Argument(metavar="REF|DIGEST|FILE", help="name@ref, run, consent, file, or any digest."),
    ],
    down: Annotated[bool, typer.Option("--down", help="Walk downstream instead of upstream.")] = False,
    graph: Annotated[
        Literal["mermaid", "dot"] | None, typer.Option("--format", help="Graph to print instead of the table.")
    ] = None,
    openlineage: Annotated[
        Path | None, typer.Option("--openlineage", metavar="FILE", help="File for OpenLineage events, one per line.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show lineage, upstream to the images or downstream to the versions."""
    from flows.cli.output import print_json, print_table
    from lora_engine.files import atomic_write, sha256_file
    from registry.lineage.record import Lineage

    records = Lineage(open_home().lineage_url)
    try:
        # A file is looked up by the digest of its bytes.
        start = sha256_file(Path(ref)) if "@" not in ref and Path(ref).is_file() else ref
        walk = records.walk(start, "down" if down else "up", subjects=True)
        if openlineage is not None:
            from registry.lineage.openlineage import to_lines, to_openlineage

            atomic_write(openlineage, to_lines(to_openlineage(records, walk)))
    finally:
        records.close()
    if graph is not None:
        print(walk.to_mermaid() if graph == "mermaid" else walk.to_dot(), end="")
    elif as_json:
        print_json(walk)
    elif openlineage:
        print(openlineage)
    else:
        print_table(("depth", "kind", "label", "digest or id"), [(n.depth, n.kind, n.label, n.id) for n in walk.nodes])
