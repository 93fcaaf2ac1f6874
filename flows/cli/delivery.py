"""Defines the verb `deliver`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from tasks.operations.deliver import TargetReport


def add_verbs(app: typer.Typer) -> None:
    """Adds the verb."""
    add_verb(app, Access.WRITE, deliver)


def deliver(
    name: Annotated[str | None, typer.Argument(help="Adapter to deliver. Default: all.")] = None,
    target: Annotated[str | None, typer.Option(metavar="TARGET", help="Target of delivery.yaml. Default: all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what differs; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Make the targets of delivery.yaml hold the versions that their aliases point at."""
    from flows.cli.output import print_json
    from tasks.operations.deliver import deliver_adapters

    home = open_home(Access.READ if dry_run else None)
    reports = deliver_adapters(home, [name] if name else [], target, dry_run=dry_run)
    if as_json:
        print_json([report.as_json() for report in reports])
    else:
        _print_reports(reports)
    if any(report.problems for report in reports):
        raise typer.Exit(1)


def _print_reports(reports: list[TargetReport]) -> None:
    from flows.cli.output import print_table

    if not reports:
        print("no targets: see delivery.yaml in docs/delivery.md")
    for report in reports:
        print(f"{report.target}: {report.to}: {len(report.current)} up to date, {len(report.changes)} differ")
        rows = [
            (change.action, change.ref, change.before, change.path, change.event, change.error or change.reason)
            for change in report.changes
        ]
        if rows:
            print_table(("action", "version", "before", "path", "event", "reason"), rows)
        if report.error:
            typer.echo(f"loraline: {report.target}: {report.error}", err=True)
