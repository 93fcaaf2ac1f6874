"""Defines the verbs of governance: withdraw, delete, restore, unalias, log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import Expect, Json, Reason, Ref
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from registry.entities import Event
    from registry.store.chain import Head
    from registry.versions.versions import Versions


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.WRITE, restore)
    add_verb(app, Access.DELETE, withdraw, delete, unalias)
    add_verb(app, Access.READ, log)


def withdraw(ref: Ref, reason: Reason, expect: Expect = None, as_json: Json = False) -> None:
    """Withdraw a version: it is neither promoted nor exported until `restore`."""
    from registry.versions.deletion import withdraw as act

    _change(act, ref, reason, as_json, "withdrawn", expect=expect)


def delete(ref: Ref, reason: Reason, expect: Expect = None, as_json: Json = False) -> None:
    """Delete a version. Refused for versions in production and for those that they were made from."""
    from registry.versions.deletion import delete as act

    _change(act, ref, reason, as_json, "deleted; its number is not reused", expect=expect)


def restore(ref: Ref, reason: Reason, as_json: Json = False) -> None:
    """Restore a withdrawn version, or a deleted one whose bytes still exist."""
    from registry.versions.deletion import restore as act

    _change(act, ref, reason, as_json, "restored; its aliases were not")


def unalias(
    ref: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="Alias to remove.")],
    reason: Reason,
    expect: Expect = None,
    as_json: Json = False,
) -> None:
    """Remove an alias; `rollback` restores it."""
    from registry.refs import split_ref
    from registry.versions.promotion import remove

    name, alias = split_ref(ref)
    event = remove(open_versions(), name, alias, reason=reason, expect=expect)
    print_event(event, as_json, f"{alias}: {name}@{event.before} -> none")


def log(
    name: Annotated[str | None, typer.Argument(help="Adapter to show. Default: all.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to show. Default: all.")] = None,
    head: Annotated[bool, typer.Option("--head", help="Print number and digest of the newest event only.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="With --head: its file, and FILE.sig for the signature."),
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key that signs the head.")] = None,
    as_json: Json = False,
) -> None:
    """Show the log of events: action, time, user and reason."""
    from flows.cli.output import print_json, print_table
    from registry.versions.promotion import history, read_log

    if output or key:
        _write_head(head, output, key, as_json)
        return
    if head:
        _print_head(as_json)
        return
    events = read_log(open_versions()) if name is None else history(open_versions(), name, alias)
    if as_json:
        print_json(events)
        return
    rows = [
        (
            event.seq,
            f"{event.at:%Y-%m-%d %H:%M:%S}",
            event.action,
            f"{event.name}@{event.alias}" if event.alias else event.name or event.subject[:24],
            event.before,
            event.after,
            event.actor,
            _reason(event),
        )
        for event in events
    ]
    print_table(("event", "time (UTC)", "action", "target", "before", "after", "user", "reason"), rows)


def _read_head() -> Head | None:
    from registry.maintenance.check_chain import EVENTS
    from registry.store.chain import read_head

    with open_versions().lineage.database.read() as session:
        return read_head(session, EVENTS)


def _write_head(is_head: bool, output: Path | None, key: Path | None, as_json: bool) -> None:
    from flows.cli.output import print_json
    from flows.cli.records import read_passphrase
    from lora_engine.errors import SettingsError
    from registry.documents.heads import write_head

    if not is_head or output is None or key is None:
        raise SettingsError("a signed head needs --head, -o FILE and --key FILE", remedy="add what is missing")
    newest = _read_head()
    if newest is None:
        raise SettingsError("the log has no event", remedy="register a version first")
    files = [str(file) for file in write_head(newest, output, key, read_passphrase(key))]
    if as_json:
        print_json({"seq": newest.seq, "digest": newest.digest, "files": files})
        return
    print(newest)
    for file in files:
        print(file)


def _print_head(as_json: bool) -> None:
    from flows.cli.output import print_json

    newest = _read_head()
    if as_json:
        print_json(newest)
    elif newest:
        print(newest)


def _reason(event: Event) -> str:
    overridden = event.details.get("overridden")
    return f"{event.reason} (against: {'; '.join(overridden)})" if overridden else event.reason


def _change(act: Any, ref: str, reason: str, as_json: bool, outcome: str, **options: str | None) -> None:
    from registry.refs import split_ref

    name, version = split_ref(ref)
    event = act(open_versions(), name, version, reason=reason, **options)
    print_event(event, as_json, f"{event.name}@{event.after}: {outcome}")


def print_event(event: Event, as_json: bool, text: str) -> None:
    """Prints an event as JSON, or the text with its number."""
    from flows.cli.output import print_json

    if as_json:
        print_json(event)
    else:
        print(f"{text}  (event {event.seq})")


def open_versions() -> Versions:
    """Opens the versions of the home."""
    from registry.versions.versions import Versions

    return Versions(open_home())
