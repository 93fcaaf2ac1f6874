"""The verbs on where versions come from and how they differ: reproduce, diff, import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import Json, open_home

if TYPE_CHECKING:
    from tasks.operations.changes import Change
    from tasks.operations.diff import Difference
    from tasks.operations.import_adapter import ImportResult
    from tasks.operations.reproduction_report import ReproductionReport

_MOST_MODULES = 12
_MOST_TEXT = 60
_DIGEST = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{48}\b")
Ref = Annotated[str, typer.Argument(metavar="NAME@REF", help="name@version or name@alias.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    for verb in (reproduce, diff):
        app.command()(verb)
    app.command("import")(import_file)


def reproduce(
    ref: Ref,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Build there and leave it; by default nothing is left.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Where the base is, if it is no longer where it was.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP.FIELD=PATH", help="The files that a step read, to begin there."),
    ] = None,
    force_differences: Annotated[
        bool, typer.Option("--force-differences", help="Go on where another result is to be expected.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a version again from lineage alone, and compare; exit code 1 if it differs."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.output import print_json
    from flows.cli.stopping import stoppable
    from tasks.operations.reproduce import find_recipe
    from tasks.operations.reproduce import reproduce as build_again

    home = open_home()
    recipe = find_recipe(home, ref, base=base, given=_places(given or []), force=force_differences)
    with stoppable(), show_run([piece.name for piece in recipe.plan.pieces], Console(stderr=True)):
        told = build_again(home, recipe, keep=keep)
    if as_json:
        print_json(told.as_json())
    else:
        _print_reproduction(told)
    if told.verdict == "differs":
        raise typer.Exit(1)


def diff(
    first: Annotated[str, typer.Argument(metavar="REF|FILE", help="name@ref, or an adapter file.")],
    second: Annotated[str, typer.Argument(metavar="REF|FILE", help="What it is compared with.")],
    as_json: Json = False,
) -> None:
    """Show how two versions or files differ: recipe, data, base, figures, rights, weights."""
    from flows.cli.output import print_json
    from tasks.operations.diff import diff as compare

    only_files = Path(first).exists() and Path(second).exists()
    told = compare(None if only_files else open_home(), first, second)
    if as_json:
        print_json(told.as_json())
    else:
        _print_difference(told)


def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter of any format, or a PEFT folder.")],
    name: Annotated[str, typer.Option(help="The name to register it under.")],
    base: Annotated[
        str,
        typer.Option(metavar="BASE", help="What it is for: sd15, sd2, sdxl, sd3, flux, tiny, a folder, or a hub id."),
    ],
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="L", help="An SPDX id, or NOASSERTION; asked for on a terminal.")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="The word that calls it, if the file does not say.")] = None,
    alias: Annotated[str | None, typer.Option(help="An alias to ask for.")] = None,
    as_json: Json = False,
) -> None:
    """Register somebody else's adapter: checked in full, its own bytes kept beside, its licence stated."""
    from flows.cli.output import print_json
    from flows.cli.versions import describe
    from tasks.operations.import_adapter import ImportRequest, import_adapter, inspect_file

    home = open_home()
    stated = license_id or _ask_license(file, inspect_file(file))
    done = import_adapter(home, file, ImportRequest(name, base, stated, trigger, alias))
    if as_json:
        told = {"format": done.format, "original": done.original, "is_new": done.is_new, "refused": done.refused}
        print_json(describe(done.version, whole=True) | told)
    else:
        _print_import(done)
    if done.refused:
        raise typer.Exit(1)


def _ask_license(file: Path, facts: dict[str, Any]) -> str:
    import sys

    from tasks.errors import SpecError

    card = facts["card"]
    known = {"licence": card.get("license"), "title": card.get("title"), "base": card.get("base")}
    said = ", ".join(f"{what} {text!r}" for what, text in known.items() if text) or "nothing"
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"{file}: its header says {said}.")
        answer: str = typer.prompt("Licence (an SPDX id, or NOASSERTION)", default=card.get("license"))
        return answer
    raise SpecError(
        f"no licence is given, and the file's header says {said}",
        where=str(file),
        remedy="add --license with an SPDX id, or NOASSERTION, which keeps it from production",
    )


def _print_import(done: ImportResult) -> None:
    from flows.cli.output import print_facts

    version = done.version
    facts: list[tuple[str, object]] = [
        ("version", version.ref if done.is_new else f"{version.ref} (the same as before)"),
        ("sha256", version.sha256),
        ("format", done.format),
        *(("original", f"{path}  sha256 {digest}") for path, digest in done.original.items()),
        ("licence", version.card.get("license")),
        ("base", version.card.get("base")),
        ("trigger", version.card.get("trigger")),
        ("gates", "not run"),
        ("aliases", ", ".join(version.aliases)),
        ("REFUSED", done.refused),
    ]
    print_facts(facts)


def _print_difference(told: Difference) -> None:
    from flows.cli.output import print_facts, print_table

    heads = (told.first["name"], told.second["name"])
    for title in ("recipe", "data", "base", "metrics", "gates", "license", "parents", "environment"):
        changes: Sequence[Change] = getattr(told, title)
        if changes:
            rows = [(_DIGEST.sub(r"\1", c.path), c.kind, _short(c.before), _short(c.after)) for c in changes]
            print_table((title, "", *heads), rows)
    weights = told.weights
    same = told.first["sha256"] == told.second["sha256"] != ""
    shown = [
        (name, _pair(module["kinds"]), _pair(module["ranks"]), _figure(module["relative"]), _figure(module["cosine"]))
        for name, module in list(weights["modules"].items())[:_MOST_MODULES]
    ]
    if not same:
        print_table(("module, farthest first", "kind", "rank", "relative", "cosine"), shown)
    left = 0 if same else len(weights["modules"]) - len(shown)
    print_facts(
        [
            ("modules", len(weights["modules"])),
            ("not shown", f"{left} that are nearer; --json has all" if left > 0 else None),
            ("added", len(weights["added"]) or None),
            ("removed", len(weights["removed"]) or None),
            ("words", ", ".join(f"{word} {_figure(gap)}" for word, gap in weights["words"].items())),
            ("weights", "the same file, byte by byte" if same else _weights(weights)),
            *(("note", note) for note in told.notes),
        ]
    )


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."


def _pair(values: Sequence[object]) -> str:
    before, after = ("none" if value is None else value for value in values)
    return str(before) if before == after else f"{before} -> {after}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _print_reproduction(told: ReproductionReport) -> None:
    from flows.cli.output import print_facts, print_table

    words = {True: "same", False: "DIFFERS", None: "taken"}
    rows = [(s.name, s.uses, s.recorded[:16], (s.rebuilt or "")[:16], words[s.same], s.note) for s in told.steps]
    print_table(("step", "uses", "recorded", "rebuilt", "", "note"), rows)
    if told.surroundings:
        changed = [(s.what, s.before, s.now, ", ".join(s.steps)) for s in told.surroundings]
        print_table(("surroundings", "recorded", "now", "steps"), changed)
    if told.card:
        print_table(("card", "recorded", "rebuilt"), [(c.path, c.before, c.after) for c in told.card])
    facts: list[tuple[str, object]] = [
        ("version", told.version),
        ("recorded", f"sha256 {told.sha256}"),
        ("rebuilt", f"sha256 {told.rebuilt}"),
        *(("doubt", doubt) for doubt in told.doubts),
        ("weights", told.note or _weights(told.weights)),
        ("tolerance", told.tolerance),
        ("workspace", told.workspace),
        ("verdict", told.verdict),
    ]
    print_facts(facts)


def _weights(told: dict[str, Any] | None) -> str:
    if told is None:
        return ""
    figures = [(name, told[key]) for name, key in (("relative difference", "relative"), ("cosine", "cosine"))]
    figures.append(("largest difference of a factor", told["largest"]))
    return ", ".join(f"{name} {value:.3g}" for name, value in figures if value is not None)


def _places(given: list[str]) -> dict[str, Path]:
    from tasks.errors import SpecError

    places = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path or "." not in name:
            raise SpecError(f"{text!r}", where="--given", allowed="STEP.FIELD=PATH, such as photos.images=pictures/")
        places[name] = Path(path)
    return places
