"""Defines the verbs of governance: revoke, recall, lift, withdraw, delete, restore, unalias, log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import Expect, Json, Reason, Ref, open_home
from flows.cli.verbs import Access, add_verb

if TYPE_CHECKING:
    from registry.entities import Event
    from registry.versions.impact import ImpactReport, Recall
    from registry.versions.versions import Versions

_Subject = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        help="Image or adapter file, digest, NAME@REF, id of a consent, or name or fingerprint of a base.",
    ),
]
_Policy = Annotated[
    str | None, typer.Option(metavar="flag|withdraw", help="Action on affected versions. Default: from policy.yaml.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the affected versions; change nothing.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.WRITE, revoke, recall, lift, restore)
    add_verb(app, Access.DELETE, withdraw, delete, unalias)
    add_verb(app, Access.READ, log)


def revoke(
    subject: _Subject,
    reason: Reason,
    policy: _Policy = None,
    dry_run: _DryRun = False,
    as_json: Json = False,
) -> None:
    """Revoke an image, a consent, a version, a file or a base: find everything made from it, and block it."""
    from flows.cli.output import print_json
    from registry.identity import current_user
    from registry.versions.revocation import revoke as revoke_subject

    impact = revoke_subject(
        _versions(), subject, reason=reason, actor=current_user(), policy=_recall_policy(policy), dry_run=dry_run
    )
    if as_json:
        print_json(impact)
    else:
        _print_impact(impact)


def recall(
    reason: Reason,
    consent: Annotated[Path | None, typer.Option(help="Newer file of consents; names files or their sha256.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of its images. Default: the folder of the file.")] = None,
    policy: _Policy = None,
    dry_run: _DryRun = False,
    as_json: Json = False,
) -> None:
    """Revoke every image whose consent expired or whose owner opted out since it was used."""
    from flows.cli.output import print_facts, print_json, print_table
    from tasks.operations.recall import recall_images

    action = _recall_policy(policy)
    home = open_home()
    report = recall_images(home, reason, statements=consent, images=images, policy=action, dry_run=dry_run)
    if as_json:
        print_json(report)
        return
    print_facts(
        [
            ("would revoke" if dry_run else "revoked", f"{len(report.images)} images"),
            ("versions", ", ".join(report.versions) or "none"),
            ("aliases", ", ".join(report.aliases)),
            ("unreadable", ", ".join(f"dataset {digest[:16]}" for digest in report.unreadable)),
        ]
    )
    if report.images:
        print_table(
            ("image", "sha256", "reason"),
            [(image.source, image.sha256[:16], "; ".join(image.reasons)) for image in report.images],
        )


def _recall_policy(policy: str | None) -> Recall | None:
    from tasks.errors import SpecError

    if policy not in {None, "flag", "withdraw"}:
        raise SpecError(f"unknown policy {policy!r}", where="--policy", allowed="flag, withdraw")
    return "withdraw" if policy == "withdraw" else "flag" if policy else None


def lift(subject: _Subject, reason: Reason, as_json: Json = False) -> None:
    """Undo a revocation: allow training with it again, and restore the versions that it withdrew."""
    from registry.identity import current_user
    from registry.versions.revocation import lift as lift_revocation

    event = lift_revocation(_versions(), subject, reason=reason, actor=current_user())
    restored = ", ".join(event.details["restored"]) or "nothing"
    _print_event(event, as_json, f"{event.details['kind']} {event.subject} may be used again; restored: {restored}")


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
    from registry.identity import current_user
    from registry.refs import split_ref
    from registry.versions.promotion import remove

    name, alias = split_ref(ref)
    event = remove(_versions(), name, alias, reason=reason, actor=current_user(), expect=expect)
    _print_event(event, as_json, f"{alias}: {name}@{event.before} -> none")


def log(
    name: Annotated[str | None, typer.Argument(help="Adapter to show. Default: all.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to show. Default: all.")] = None,
    head: Annotated[bool, typer.Option("--head", help="Print number and digest of the newest event only.")] = False,
    as_json: Json = False,
) -> None:
    """Show the log of events: action, time, user and reason."""
    from flows.cli.output import print_json, print_table
    from registry.versions.promotion import history, read_log

    if head:
        _print_head(as_json)
        return

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
            _reason(event),
        )
        for event in events
    ]
    print_table(("event", "time (UTC)", "action", "target", "before", "after", "user", "reason"), rows)


def _print_head(as_json: bool) -> None:
    from flows.cli.output import print_json
    from registry.maintenance.check_chain import EVENTS
    from registry.store.chain import read_head

    with _versions().lineage.database.read() as session:
        newest = read_head(session, EVENTS)
    if as_json:
        print_json(newest)
    elif newest:
        print(newest)


def _reason(event: Event) -> str:
    overridden = event.details.get("overridden")
    return f"{event.reason} (against: {'; '.join(overridden)})" if overridden else event.reason


def _print_impact(impact: ImpactReport) -> None:
    from flows.cli.output import print_facts, print_table
    from registry.policy.revocations import NOUNS

    moves = {
        name: f"rolled back to version {number}" if number else "removed" for name, number in impact.taken_back.items()
    }
    print_facts(
        [
            ("revoked" if impact.event else "would revoke", f"{NOUNS.get(impact.kind, impact.kind)} {impact.subject}"),
            ("unknown", "nothing here has it; it is blocked from now on" if impact.kind == "digest" else ""),
            ("event", impact.event),
            ("images", len(impact.pictures)),
            ("datasets", ", ".join(digest[:16] for digest in impact.manifests)),
            ("runs", ", ".join(f"{run['name']} {run['id'][:8]}" for run in impact.runs)),
            ("versions", ", ".join(impact.versions) or "none"),
            ("merges", ", ".join(entry[:32] for entry in impact.merges)),
            ("policy", {"flag": "flagged; promotion is refused", "withdraw": "withdrawn"}[impact.policy]),
        ]
    )
    if impact.exports:
        print_table(("exported", "files"), [_export_row(entry) for entry in impact.exports])
    if impact.results:
        rows = [(entry["verb"], ", ".join(file["sha256"] for file in entry["files"])) for entry in impact.results]
        print_table(("made by", "sha256 of the files"), rows)
    for digest in impact.unreadable:
        print(f"dataset {digest[:16]} cannot be read: restore it and revoke again, or its images stay unknown")
    for name, number in impact.aliases.items():
        move = moves.get(name, "STILL POINTS AT IT: promote another version, or revoke with --policy withdraw")
        print(f"{name} -> version {number}: {move}")


def _export_row(entry: Any) -> tuple[str, str]:
    if "artifact" in entry:
        return "by a convert step", str(entry["artifact"])[:16]
    return str(entry["version"]), ", ".join(str(file.get("file", file)) for file in entry["files"])


def _change(act: Any, ref: str, reason: str, as_json: bool, outcome: str, **options: str | None) -> None:
    from registry.identity import current_user
    from registry.refs import split_ref

    name, version = split_ref(ref)
    event = act(_versions(), name, version, reason=reason, actor=current_user(), **options)
    _print_event(event, as_json, f"{event.name}@{event.after}: {outcome}")


def _print_event(event: Event, as_json: bool, text: str) -> None:
    from flows.cli.output import print_json

    if as_json:
        print_json(event)
    else:
        print(f"{text}  (event {event.seq})")


def _versions() -> Versions:
    from registry.versions.versions import Versions

    return Versions(open_home())
