"""The verbs on rights and on what is kept: revoke, lift, withdraw, delete, restore, unalias, log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import Json, open_home

if TYPE_CHECKING:
    from registry.entities import Event
    from registry.versions.impact import ImpactReport
    from registry.versions.versions import Versions

Ref = Annotated[str, typer.Argument(metavar="NAME@REF", help="name@version or name@alias.")]
Subject = Annotated[
    str, typer.Argument(metavar="PICTURE|DIGEST|CONSENT", help="A picture file, its digest, or the id of a consent.")
]
Reason = Annotated[str, typer.Option(help="Why; kept in the log.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    for verb in (revoke, lift, withdraw, delete, restore, unalias, log):
        app.command()(verb)


def revoke(
    subject: Subject,
    reason: Reason,
    policy: Annotated[
        str | None, typer.Option(metavar="flag|withdraw", help="What happens to what it reached; as policy.yaml says.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be reached; change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Recall a picture or a consent: find all that was made from it, and train without it from now on."""
    from flows.cli.output import print_json
    from registry.identity import current_user
    from registry.versions.revocation import revoke as recall
    from tasks.errors import SpecError

    if policy not in {None, "flag", "withdraw"}:
        raise SpecError(f"{policy!r} is no policy", where="--policy", allowed="flag, withdraw")
    reach = recall(
        _versions(),
        subject,
        reason=reason,
        actor=current_user(),
        policy="withdraw" if policy == "withdraw" else "flag" if policy else None,
        dry_run=dry_run,
    )
    if as_json:
        print_json(reach)
    else:
        _show_reach(reach)


def lift(subject: Subject, reason: Reason, as_json: Json = False) -> None:
    """Lift a revocation: train with it again, and use again what was withdrawn for it."""
    from registry.identity import current_user
    from registry.versions.revocation import lift as undo

    event = undo(_versions(), subject, reason=reason, actor=current_user())
    restored = ", ".join(event.details["restored"]) or "nothing"
    _done(event, as_json, f"{event.details['kind']} {event.subject} may be used again; in use again: {restored}")


def withdraw(ref: Ref, reason: Reason, as_json: Json = False) -> None:
    """Take a version out of use: not promoted, not handed out; `restore` brings it back."""
    from registry.versions.deletion import withdraw as act

    _change(act, ref, reason, as_json, "withdrawn")


def delete(ref: Ref, reason: Reason, as_json: Json = False) -> None:
    """Delete a version; refused for what is in production and for what that was made from."""
    from registry.versions.deletion import delete as act

    _change(act, ref, reason, as_json, "deleted; its number stays taken")


def restore(ref: Ref, reason: Reason, as_json: Json = False) -> None:
    """Bring a withdrawn version back, or a deleted one whose bytes are still there."""
    from registry.versions.deletion import restore as act

    _change(act, ref, reason, as_json, "in use again; its aliases did not come back")


def unalias(
    ref: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="The alias to remove.")],
    reason: Reason,
    as_json: Json = False,
) -> None:
    """Remove an alias; `rollback` brings it back."""
    from registry.identity import current_user
    from registry.versions.promotion import remove

    name, _, alias = ref.partition("@")
    event = remove(_versions(), name, alias, reason=reason, actor=current_user())
    _done(event, as_json, f"{alias}: {name}@{event.before} -> none")


def log(
    name: Annotated[str | None, typer.Argument(help="Only this adapter.")] = None,
    alias: Annotated[str | None, typer.Option(help="Only this alias of it.")] = None,
    as_json: Json = False,
) -> None:
    """Show the log: who did what, when and why, before and after."""
    from flows.cli.output import print_json, print_table
    from registry.versions.promotion import history, read_log

    events = read_log(_versions()) if name is None else history(_versions(), name, alias)
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
            _why(event),
        )
        for event in events
    ]
    print_table(("event", "when (UTC)", "what", "of", "before", "after", "who", "why"), rows)


def _why(event: Event) -> str:
    overridden = event.details.get("overridden")
    return f"{event.reason} (against: {'; '.join(overridden)})" if overridden else event.reason


def _show_reach(reach: ImpactReport) -> None:
    from flows.cli.output import print_facts, print_table

    held = {f"{name}": number for name, number in reach.aliases.items()}
    taken = {name: f"taken back to version {to}" if to else "removed" for name, to in reach.taken_back.items()}
    print_facts(
        [
            ("revoked" if reach.event else "would revoke", f"{reach.kind} {reach.subject}"),
            ("event", reach.event),
            ("pictures", len(reach.pictures)),
            ("datasets", ", ".join(digest[:16] for digest in reach.manifests)),
            ("runs", ", ".join(f"{run['name']} {run['id'][:8]}" for run in reach.runs)),
            ("versions", ", ".join(reach.versions) or "none"),
            ("merges", ", ".join(entry[:32] for entry in reach.merges)),
            ("policy", {"flag": "flagged, and not promoted any more", "withdraw": "withdrawn"}[reach.policy]),
        ]
    )
    if reach.exports:
        print_table(("exported", "files"), [_export_row(entry) for entry in reach.exports])
    for name, number in held.items():
        fate = taken.get(name, "STILL POINTS AT IT: promote another version, or revoke with --policy withdraw")
        print(f"{name} -> version {number}: {fate}")


def _export_row(entry: Any) -> tuple[str, str]:
    if "artifact" in entry:
        return "by a convert step", str(entry["artifact"])[:16]
    return str(entry["version"]), ", ".join(str(file.get("file", file)) for file in entry["files"])


def _change(act: Any, ref: str, reason: str, as_json: bool, word: str) -> None:
    from registry.identity import current_user
    from tasks.operations.promote import find_version

    versions = _versions()
    version = find_version(versions, ref)
    event = act(versions, version.name, version.version, reason=reason, actor=current_user())
    _done(event, as_json, f"{version.ref}: {word}")


def _done(event: Event, as_json: bool, text: str) -> None:
    from flows.cli.output import print_json

    if as_json:
        print_json(event)
    else:
        print(f"{text}  (event {event.seq})")


def _versions() -> Versions:
    from registry.versions.versions import Versions

    return Versions(open_home())
