"""Defines the verbs on folders of images: dataset, caption, recaption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb

_Trigger = Annotated[str | None, typer.Option(help="Word for the concept.")]
_ClassWord = Annotated[str | None, typer.Option(help="Class of the concept, such as dog.")]
_CheckBase = Annotated[str | None, typer.Option(help="Base whose tokenizers read trigger and captions.")]
_Clip = Annotated[str | None, typer.Option(metavar="FOLDER", help="CLIP that compares captions with images.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.NONE, dataset)
    add_verb(app, Access.WRITE, caption, recaption)


def dataset(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder or archive (tar, zip, parquet) of images.")],
    layout: Annotated[
        str,
        typer.Option(
            help="auto, plain, kohya, huggingface, onetrainer, ai-toolkit or simpletuner: the meaning of names."
        ),
    ] = "auto",
    heldout: Annotated[float, typer.Option(help="Share of the images that is held out from training.")] = 0.0,
    resolution: Annotated[
        int | None, typer.Option(min=16, max=4096, help="Side of the training images in pixels.")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="Prepare the images too: center, salient, random, subject, face or bucket.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Prepare the images too: files, faces, or '{name: text, prompt: a dog}'.")
    ] = None,
    consent: Annotated[Path | None, typer.Option(help="File of consents.")] = None,
    trigger: _Trigger = None,
    class_word: _ClassWord = None,
    base: _CheckBase = None,
    clip: _Clip = None,
    aesthetic: Annotated[
        Path | None, typer.Option(metavar="HEAD", help="Linear head on the CLIP that rates images, or its folder.")
    ] = None,
    several_captions: Annotated[
        Literal["auto", "first", "draw"], typer.Option(help="Lines and lists of captions: joined, the first, or drawn.")
    ] = "auto",
    c2pa_roots: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Root certificates by which C2PA signatures are trusted.")
    ] = None,
    page: Annotated[Path | None, typer.Option("-o", "--output", metavar="PAGE", help="Contact sheet (HTML).")] = None,
    as_json: Json = False,
) -> None:
    """Show what ingest makes of a folder: images, captions, class images, duplicates, flaws. Trains nothing."""
    from flows.cli.output import print_facts, print_json
    from lora_engine.documents import parse_value
    from tasks.errors import SpecError
    from tasks.operations.dataset import examine_folder

    wanted = {"crop": crop, "mask": mask}
    facts = examine_folder(
        images,
        layout,
        heldout,
        resolution,
        consent,
        page,
        trigger=trigger,
        class_word=class_word,
        base=base,
        clip=clip,
        aesthetic=aesthetic,
        several_captions=several_captions,
        c2pa_roots=c2pa_roots,
        preparation={k: parse_value(text, f"--{k}", SpecError) for k, text in wanted.items() if text is not None},
    )
    if as_json:
        print_json(facts)
        return
    print_facts(
        [
            ("dataset", facts["dataset"]),
            ("prepared", facts["prepared"]),
            *(("not used", f"{item['source']}: {item['reason']}") for item in facts["quarantined"]),
            *(("skipped", f"{count} images: {reason}") for reason, count in facts["skipped"].items()),
            *(("note", line) for line in facts["notes"]),
            *(("alike", ", ".join(group)) for group in facts["alike"]),
            *(("origin", f"{name}: {text}") for name, text in facts["generation"].items()),
            *(("flaw", f"{name}: {', '.join(flaws)}") for name, flaws in facts["flaws"].items()),
            *(("rating", f"{name}: {rating:.2f}") for name, rating in facts["ratings"].items()),
            *(("advice", line) for line in facts["advice"]),
            ("page", facts["page"]),
        ]
    )


def caption(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of images.")],
    captioner: Annotated[
        str | None, typer.Option(metavar="ID|FOLDER", help="Vision-language model: hub id[@revision] or folder.")
    ] = None,
    tagger: Annotated[
        str | None, typer.Option(metavar="ID|FOLDER", help="Tagger; with --captioner, its tags are a hint.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Instruction for the model. Default: that of its family.")] = None,
    style: Annotated[Literal["sentences", "tags"], typer.Option(help="Style of the captions.")] = "sentences",
    trigger: _Trigger = None,
    class_word: _ClassWord = None,
    existing: Annotated[
        Literal["keep", "replace", "append"], typer.Option(help="What becomes of captions that exist.")
    ] = "keep",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Option of the captioner, such as max_tokens=64."),
    ] = None,
    base: _CheckBase = None,
    clip: _Clip = None,
    dry_run: Annotated[bool, typer.Option(help="Show the captions; write no file beside the images.")] = False,
    as_json: Json = False,
) -> None:
    """Caption the images of a folder with a model, in text files beside them. Existing captions stay by default."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.output import print_facts, print_json
    from flows.cli.verbs import open_home
    from tasks.operations.adapter_files import parse_settings
    from tasks.operations.caption_folder import caption_folder
    from tasks.operations.captions import choose_captioner
    from tasks.progress import StepEvent, publish

    def report(done: int, total: int, values: Mapping[str, float]) -> None:
        publish(StepEvent("caption", "progress", done, total, values))

    options: dict[str, Any] = {
        "captioner": choose_captioner(captioner, tagger, prompt, style, parse_settings(settings or [])),
        "trigger": trigger,
        "class_word": class_word,
        "existing": existing,
        "check": {"base": base, "clip": clip},
    }
    with show_run(["caption"], Console(stderr=True)):
        publish(StepEvent("caption", "started"))
        facts = caption_folder(images, options, open_home(), dry_run=dry_run, progress=report)
        publish(StepEvent("caption", "completed"))
    if as_json:
        print_json(facts)
        return
    shown = facts["captions"] if dry_run else {}
    print_facts(
        [
            ("captions", facts["dataset"]),
            *(("caption", f"{name}: {item['caption']}") for name, item in shown.items()),
            ("written", f"{len(facts['written'])} files"),
            *(
                ("left", f"{name}: its text file holds something; --existing replace replaces it")
                for name in facts["left"]
            ),
            *(("not used", f"{item['source']}: {item['reason']}") for item in facts["quarantined"]),
            *(("advice", line) for line in facts["findings"]),
            *(("model", f"{model['label']} sha256 {model['fingerprint'][:16]}") for model in facts["models"].values()),
        ]
    )


def recaption(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of images.")],
    image: Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="Name of the image in the folder.")] = None,
    text: Annotated[str | None, typer.Option(help="The caption, one line.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the last change in the folder back.")] = False,
    as_json: Json = False,
) -> None:
    """Write the caption of one image into the text file beside it, or take the last such change back."""
    from flows.cli.output import print_json
    from flows.cli.verbs import open_home
    from tasks.errors import SpecError
    from tasks.operations.caption_edits import edit_caption, undo_caption

    home = open_home()
    if undo == (image is not None) or (text is None) != undo:
        raise SpecError("nothing to write", allowed="IMAGE with --text TEXT, or --undo alone")
    edit = undo_caption(home, images) if undo else edit_caption(home, images, str(image), str(text))
    if as_json:
        print_json(vars(edit))
        return
    print(f"{edit.file}: {edit.before or 'no caption'!r} -> {edit.after or 'no caption'!r}")
