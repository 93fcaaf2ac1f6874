"""Defines the verbs on the history of versions: reproduce, diff, import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import BASE_HELP, Json, Ref
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from tasks.operations.changes import Change
    from tasks.operations.diff import Difference
    from tasks.operations.import_adapter import ImportResult
    from tasks.operations.reproduction_report import ReproductionReport, StepComparison

_MOST_MODULES = 12
_MOST_TEXT = 60
_DIGEST = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{48}\b")


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.READ, reproduce, diff)
    add_verb(app, Access.WRITE, import_file, name="import")


def reproduce(
    ref: Ref,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to build in and keep. Default: a temporary folder.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Base model, if it has moved: a folder or a hub id.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP.FIELD=PATH", help="Original files of a step, to rebuild it too."),
    ] = None,
    force_differences: Annotated[
        bool, typer.Option("--force-differences", help="Rebuild even if a different result is expected.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rebuild a version from lineage alone and compare. Exit code 1 if it differs."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.output import print_json
    from flows.cli.stopping import stoppable
    from tasks.operations.reproduce import find_recipe
    from tasks.operations.reproduce import reproduce as rebuild_version

    home = open_home()
    recipe = find_recipe(home, ref, base=base, given=_parse_given(given or []), force=force_differences)
    with stoppable(), show_run([step.name for step in recipe.plan.steps], Console(stderr=True)):
        report = rebuild_version(home, recipe, keep=keep)
    if as_json:
        print_json(report.as_json())
    else:
        _print_reproduction(report)
    if report.verdict == "differs":
        raise typer.Exit(1)


def diff(
    first: Annotated[str, typer.Argument(metavar="REF|FILE", help="name@ref or an adapter file.")],
    second: Annotated[str, typer.Argument(metavar="REF|FILE", help="name@ref or an adapter file to compare with.")],
    changes: Annotated[
        bool,
        typer.Option("--changes", help="Show only what changed in images, captions, base, recipe and revisions."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the differences of two versions or files: recipe, data, base, metrics, rights, weights."""
    if changes:
        _show_changes(first, second, as_json=as_json)
        return
    from flows.cli.output import print_json
    from lora_engine.files import is_present
    from tasks.operations.diff import diff as compare

    only_files = is_present(first) and is_present(second)
    difference = compare(None if only_files else open_home(), first, second)
    if as_json:
        print_json(difference.as_json())
    else:
        _print_difference(difference)


def _show_changes(first: str, second: str, *, as_json: bool) -> None:
    from dataclasses import asdict

    from flows.cli.output import print_facts, print_json
    from tasks.operations.changes_since import compare_releases

    changes = compare_releases(open_home(), first, second)
    if as_json:
        print_json(asdict(changes))
    else:
        print_facts([*changes.facts()] or [("changes", "none")])


def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Adapter file of any format, or a PEFT folder.")],
    name: Annotated[str, typer.Option(help="Name to register it under.")],
    base: Annotated[
        str,
        typer.Option(metavar="BASE", help=BASE_HELP),
    ],
    license_id: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="L",
            help="License: SPDX id or expression, or NOASSERTION. Default: a prompt on a terminal.",
        ),
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="Trigger word. Default: from the file.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to request.")] = None,
    recommended: Annotated[
        str | None,
        typer.Option("--recommend", metavar="W", help="Weights for prompts that give none. Default: from the file."),
    ] = None,
    override: Annotated[
        bool, typer.Option("--override", help="Import with a looser license than its parents allow; logged.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Reason of --override, stored in the log.")] = "",
    as_json: Json = False,
) -> None:
    """Import an adapter file as a version: finds its parents, checks its license, keeps its original bytes."""
    from flows.cli.output import print_json
    from flows.cli.versions import describe
    from tasks.operations.import_adapter import import_adapter
    from tasks.operations.import_request import ImportRequest
    from tasks.operations.imported_file import inspect_file

    home = open_home()
    stated = license_id or _ask_license(file, inspect_file(file))
    result = import_adapter(
        home, file, ImportRequest(name, base, stated, trigger, alias, override, reason, recommended)
    )
    if as_json:
        shown = ("format", "original", "is_new", "refused", "similar", "warnings")
        extra = {name: getattr(result, name) for name in shown}
        print_json(describe(result.version, details=True) | extra)
    else:
        _print_import(result)
    if result.refused:
        raise typer.Exit(1)


def _ask_license(file: Path, facts: dict[str, Any]) -> str:
    import sys

    from tasks.errors import SpecError

    card = facts["card"]
    stated = ", ".join(f"{key} {card[key]!r}" for key in ("license", "title", "base") if card.get(key)) or "nothing"
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"{file}: its header states {stated}.")
        answer: str = typer.prompt("License (an SPDX id, or NOASSERTION)", default=card.get("license"))
        return answer
    raise SpecError(
        f"no license is given, and the file's header states {stated}",
        where=str(file),
        remedy="add --license with an SPDX id, or NOASSERTION, which keeps it from production",
    )


def _print_import(result: ImportResult) -> None:
    from flows.cli.output import clean, print_facts

    version = result.version
    facts: list[tuple[str, object]] = [
        ("version", version.ref if result.is_new else f"{version.ref} (unchanged)"),
        ("sha256", version.sha256),
        ("format", result.format),
        *(("original", f"{path}  sha256 {digest}") for path, digest in result.original.items()),
        ("license", version.card.get("license")),
        ("base", version.card.get("base")),
        ("made from", ", ".join(result.parents)),
        ("trigger", version.card.get("trigger")),
        ("gates", "not run"),
        ("aliases", ", ".join(version.aliases)),
        ("REFUSED", result.refused),
    ]
    print_facts(facts)
    for warning in result.warnings:
        typer.echo(f"warning: {clean(warning)}", err=True)
    for name, value in result.similar.items():
        typer.echo(
            f"warning: its content resembles {clean(name)} (similarity {value:.2f}): is it made from it?", err=True
        )


def _print_difference(difference: Difference) -> None:
    from flows.cli.output import print_facts, print_table

    names = (difference.first["name"], difference.second["name"])
    for title in ("recipe", "data", "base", "metrics", "gates", "license", "parents", "environment"):
        changes: Sequence[Change] = getattr(difference, title)
        if changes:
            rows = [(_DIGEST.sub(r"\1", c.path), c.kind, _short(c.before), _short(c.after)) for c in changes]
            print_table((title, "", *names), rows)
    weights = difference.weights
    same = difference.first["sha256"] == difference.second["sha256"] != ""
    shown = [
        (name, _pair(module["kinds"]), _pair(module["ranks"]), _figure(module["relative"]), _figure(module["cosine"]))
        for name, module in list(weights["modules"].items())[:_MOST_MODULES]
    ]
    if not same:
        print_table(("module, largest difference first", "kind", "rank", "relative", "cosine"), shown)
    left = 0 if same else len(weights["modules"]) - len(shown)
    print_facts(
        [
            ("modules", len(weights["modules"])),
            ("not shown", f"{left} with smaller differences; --json has all" if left > 0 else None),
            ("added", len(weights["added"]) or None),
            ("removed", len(weights["removed"]) or None),
            ("tokens", ", ".join(f"{token} {_figure(gap)}" for token, gap in weights["words"].items())),
            ("weights", "identical files" if same else _weights(weights)),
            *(("note", note) for note in difference.notes),
        ]
    )


def _short(value: object) -> str:
    from tasks.operations.changes import show_value

    text = "" if value is None else show_value(value)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."


def _pair(values: Sequence[object]) -> str:
    before, after = ("none" if value is None else value for value in values)
    return str(before) if before == after else f"{before} -> {after}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _print_reproduction(report: ReproductionReport) -> None:
    from flows.cli.output import print_facts, print_table

    print_table(("step", "uses", "recorded", "rebuilt", "", "note"), map(_step_row, report.steps))
    if report.environment_diffs:
        changed = [(d.what, d.before, d.now, ", ".join(d.steps)) for d in report.environment_diffs]
        print_table(("environment", "recorded", "now", "steps"), changed)
    if report.card:
        print_table(("card", "recorded", "rebuilt"), [(c.path, c.before, c.after) for c in report.card])
    facts: list[tuple[str, object]] = [
        ("version", report.version),
        ("recorded", f"sha256 {report.sha256}"),
        ("rebuilt", f"sha256 {report.rebuilt}"),
        *(("warning", warning) for warning in report.warnings),
        ("weights", report.note or _weights(report.weights)),
        ("tolerance", report.tolerance),
        ("workspace", report.workspace),
        ("verdict", report.verdict),
    ]
    print_facts(facts)


def _step_row(step: StepComparison) -> tuple[object, ...]:
    state = {True: "same", False: "DIFFERS", None: "reused"}[step.same]
    return step.name, step.uses, step.recorded[:16], (step.rebuilt or "")[:16], state, step.note


def _weights(weights: dict[str, Any] | None) -> str:
    if weights is None:
        return ""
    figures = [(name, weights[key]) for name, key in (("relative difference", "relative"), ("cosine", "cosine"))]
    figures.append(("largest difference of a factor", weights["largest"]))
    return ", ".join(f"{name} {value:.3g}" for name, value in figures if value is not None)


def _parse_given(given: list[str]) -> dict[str, Path]:
    from tasks.errors import SpecError

    paths = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path or "." not in name:
            raise SpecError(f"{text!r}", where="--given", allowed="STEP.FIELD=PATH, such as photos.images=images/")
        paths[name] = Path(path)
    return paths
