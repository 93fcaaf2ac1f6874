"""Defines the verbs on revocations: revoke, recall, lift."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.governance import open_versions, print_event
from flows.cli.output import Json, Reason
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from registry.versions.impact import ImpactReport, Recall

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
    add_verb(app, Access.WRITE, revoke, recall, lift)


def revoke(
    subject: _Subject,
    reason: Reason,
    policy: _Policy = None,
    dry_run: _DryRun = False,
    as_json: Json = False,
) -> None:
    """Revoke an image, a consent, a version, a file or a base: find everything made from it, and block it."""
    from flows.cli.output import print_json
    from registry.versions.revocation import revoke as revoke_subject

    impact = revoke_subject(open_versions(), subject, reason=reason, policy=_recall_policy(policy), dry_run=dry_run)
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
    from registry.versions.revocation import lift as lift_revocation

    event = lift_revocation(open_versions(), subject, reason=reason)
    restored = ", ".join(event.details["restored"]) or "nothing"
    print_event(event, as_json, f"{event.details['kind']} {event.subject} may be used again; restored: {restored}")


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
