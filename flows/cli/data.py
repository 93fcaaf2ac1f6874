"""Defines the verb on folders of images: dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verb to the command."""
    add_verb(app, Access.NONE, dataset)


def dataset(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of images.")],
    layout: Annotated[
        str, typer.Option(help="auto, plain or kohya: the meaning of folder names such as '10_sks dog'.")
    ] = "auto",
    heldout: Annotated[float, typer.Option(help="Share of the images that is held out from training.")] = 0.0,
    resolution: Annotated[
        int | None, typer.Option(min=16, max=4096, help="Side of the training images in pixels.")
    ] = None,
    consent: Annotated[Path | None, typer.Option(help="File of consents.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP; compares class images with captions.")] = None,
    aesthetic: Annotated[
        Path | None, typer.Option(metavar="HEAD", help="Linear head on the CLIP that rates images, or its folder.")
    ] = None,
    page: Annotated[Path | None, typer.Option("-o", "--output", metavar="PAGE", help="Contact sheet (HTML).")] = None,
    as_json: Json = False,
) -> None:
    """Show what ingest makes of a folder: images, captions, class images, duplicates, flaws. Trains nothing."""
    from flows.cli.output import print_facts, print_json
    from tasks.operations.dataset import examine_folder

    facts = examine_folder(images, layout, heldout, resolution, consent, page, clip=clip, aesthetic=aesthetic)
    if as_json:
        print_json(facts)
        return
    print_facts(
        [
            ("dataset", facts["dataset"]),
            *(("not used", f"{item['source']}: {item['reason']}") for item in facts["quarantined"]),
            *(("alike", ", ".join(group)) for group in facts["alike"]),
            *(("origin", f"{name}: {text}") for name, text in facts["generation"].items()),
            *(("flaw", f"{name}: {', '.join(flaws)}") for name, flaws in facts["flaws"].items()),
            *(("rating", f"{name}: {rating:.2f}") for name, rating in facts["ratings"].items()),
            *(("advice", line) for line in facts["advice"]),
            ("page", facts["page"]),
        ]
    )
