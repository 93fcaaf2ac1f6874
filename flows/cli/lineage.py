"""The verb `lineage`: what something was made from, or what was made from it, as table, JSON, events or picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import Json, open_home


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verb to the command."""
    app.command()(lineage)


def lineage(
    ref: Annotated[
        str,
        typer.Argument(metavar="REF|DIGEST|FILE", help="name@ref, a run, a consent, a file, or a digest of anything."),
    ],
    down: Annotated[
        bool, typer.Option("--down", help="What was made from it, instead of what it was made from.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.svg", help="Draw it into this file.")
    ] = None,
    openlineage: Annotated[
        Path | None, typer.Option("--openlineage", metavar="FILE", help="Write OpenLineage events, one a line.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Walk lineage, up to the pictures or down to the versions."""
    from flows.cli.output import print_json, print_table
    from lora_engine.files import atomic_write, sha256_file
    from registry.lineage.record import Lineage

    opened = Lineage(open_home().lineage_url)
    try:
        # A file stands for its bytes: a picture as it came, an adapter, an export.
        start = sha256_file(Path(ref)) if "@" not in ref and Path(ref).is_file() else ref
        walk = opened.walk(start, "down" if down else "up", subjects=True)
        if output is not None:
            from registry.lineage.picture import draw

            atomic_write(output, draw(walk))
        if openlineage is not None:
            from registry.lineage.openlineage import to_lines, to_openlineage

            atomic_write(openlineage, to_lines(to_openlineage(opened, walk)))
    finally:
        opened.close()
    if as_json:
        print_json(walk)
    elif output or openlineage:
        print("\n".join(str(path) for path in (output, openlineage) if path))
    else:
        print_table(("", "kind", "what", "digest or id"), [(n.depth, n.kind, n.label, n.id) for n in walk.nodes])
