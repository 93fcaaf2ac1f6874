"""Defines the verb `lineage`: shows upstream or downstream lineage as a table, JSON, events or a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb, open_home


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verb to the command."""
    add_verb(app, Access.READ, lineage)


def lineage(
    ref: Annotated[
        str,
        typer.Argument(metavar="REF|DIGEST|FILE", help="name@ref, run, consent, file, generated image, or any digest."),
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
    from lora_engine.files import atomic_write
    from registry.lineage.record import Lineage
    from registry.lineage.walk import join_walks

    records = Lineage(open_home().lineage_url)
    try:
        starts = _find_starts(ref)
        walk = join_walks([records.walk(start, "down" if down else "up", subjects=True) for start in starts])
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


def _find_starts(ref: str) -> list[str]:
    """Returns the adapters of a generated image, the digest of another file, or the reference itself."""
    from lora_engine.errors import DataError
    from lora_engine.files import sha256_file
    from lora_engine.inference.image_files import read_used_adapters

    path = Path(ref)
    if "@" in ref or not path.is_file():
        return [ref]
    used = read_used_adapters(path)
    if used == {}:
        raise DataError("the image was generated without an adapter, so it has no lineage", where=ref)
    return list(used.values()) if used else [sha256_file(path)]
