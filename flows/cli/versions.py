"""Defines the verbs on versions: list, show, report, export, promote, rollback."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import Approximate, Dtype, Energy, Expect, Json, Rank, Reason, Ref
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from registry.entities import AdapterVersion, Event
    from registry.policy.approvals import Endorsement
    from tasks.operations.vote_results import VoteResults


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.READ, list_versions, name="list")
    add_verb(app, Access.READ, show, report, export)
    add_verb(app, Access.WRITE, promote, rollback)


def list_versions(
    name: Annotated[str | None, typer.Argument(help="Adapter to list. Default: all.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Include deleted versions.")] = False,
    as_json: Json = False,
) -> None:
    """List registered adapters, their versions and aliases."""
    from flows.cli.output import print_json, print_table
    from registry.versions.versions import Versions

    versions = Versions(open_home()).list(name, deleted=everything)
    if as_json:
        print_json([describe(version) for version in versions])
        return
    rows = map(_list_row, versions)
    print_table(("name", "version", "aliases", "gates", "sha256", "size", "created (UTC)"), rows)


def _list_row(version: AdapterVersion) -> tuple[object, ...]:
    from registry.errors import DamagedRow

    try:
        return (
            version.name,
            version.version,
            ", ".join(version.aliases) if version.state == "ACTIVE" else version.state,
            version.gate_status,
            version.sha256[:16],
            f"{version.size / 1024:.0f} KiB",
            f"{version.created_at:%Y-%m-%d %H:%M}",
        )
    except DamagedRow as error:
        return (version.name, version.version, error.problem, "", "", "", "")


def show(ref: Ref, as_json: Json = False) -> None:
    """Show one version: recipe, metrics, gates, parents, card."""
    from flows.cli.output import print_facts, print_json, print_table
    from registry.versions.endorsement import list_endorsements
    from registry.versions.versions import Versions
    from tasks.operations.export_adapter import list_readable
    from tasks.operations.promote import find_version
    from tasks.operations.rights import describe_rights
    from tasks.operations.vote_results import results_of

    versions = Versions(open_home())
    version = find_version(versions, ref)
    rights = describe_rights(versions, version)
    saved = list_readable(versions, version)
    endorsements = list_endorsements(versions, version)
    votes = results_of(versions, version)
    if as_json:
        more = {"rights": rights, "saved": saved, "endorsements": list(map(describe_endorsement, endorsements))}
        more["votes"] = votes.to_json()
        print_json(describe(version, details=True) | more)
        return
    print_facts(_facts_of(version, rights, votes))
    if rights["sources"]:
        rows = [(entry["what"], entry["where"], ", ".join(_list_terms(entry))) for entry in rights["sources"]]
        print_table(("source of rights", "where", "obligations and restrictions"), rows)
    if version.metrics:
        measured = (_metric_row(name, metric) for name, metric in version.metrics.items())
        print_table(("metric", "base", "adapter", "difference", "better", "n", "verdict"), measured)
    if endorsements:
        endorsed = [(entry.alias, entry.actor, entry.actor.established, entry.reason) for entry in endorsements]
        print_table(("endorsed for", "user", "established by", "reason"), endorsed)
    if saved:
        rows = [(entry["step"], _loss(entry["validation_loss"]), entry["file"]) for entry in saved]
        print_table(("saved at step", "validation loss", "file"), rows)
    if version.params:
        print_table(("recipe", ""), sorted(version.params.items()))


def _facts_of(version: AdapterVersion, rights: Mapping[str, Any], votes: VoteResults) -> list[tuple[str, object]]:
    from tasks.operations.vote_results import describe_results

    return [
        ("version", version.ref),
        ("state", "" if version.state == "ACTIVE" else version.state),
        ("aliases", ", ".join(version.aliases)),
        ("sha256", version.sha256),
        ("size", f"{version.size} bytes"),
        ("created", f"{version.created_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("gates", version.gate_status),
        ("parents", ", ".join(version.parents)),
        ("licenses", ", ".join(rights["terms"]["licenses"])),
        ("commercial use", "allowed" if rights["commercial"] else "not allowed"),
        ("obligations", ", ".join(rights["terms"]["obligations"])),
        ("restrictions", ", ".join(rights["terms"]["restrictions"])),
        ("conflicts", "; ".join(rights["conflicts"])),
        ("revoked", "; ".join(rights["revoked"])),
        *describe_results(votes).items(),
        *((f"votes for {alias}", "; ".join(reasons)) for alias, reasons in votes.unmet.items()),
        ("MLflow run", version.mlflow_run_id),
    ]


def _metric_row(name: str, metric: Mapping[str, Any]) -> tuple[object, ...]:
    measured = (f"{metric[key]:.4f}" for key in ("base", "adapter", "difference"))
    return (name, *measured, metric["better"], metric.get("n", ""), metric.get("verdict", ""))


def describe_endorsement(entry: Endorsement) -> dict[str, Any]:
    """Returns an endorsement as a JSON object."""
    return {
        "alias": entry.alias,
        "actor": str(entry.actor),
        "established": entry.actor.established,
        "event": entry.seq,
        "reason": entry.reason,
    }


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def report(
    ref: Ref, output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="Output file.")]
) -> None:
    """Write the evaluation report of a version as one HTML file."""
    from tasks.errors import PipelineFailed
    from tasks.operations.report import write_report

    if write_report(open_home(), ref, output) is None:
        raise PipelineFailed(
            f"{ref} was never evaluated", remedy="add an evaluate step and pass its report to register"
        )
    print(output)


def export(
    ref: Ref,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="Format: {lora_engine.catalog.formats:written_formats}.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Output file (.safetensors) or folder.")
    ],
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Base model, for formats that need its module names.")
    ] = None,
    dtype: Dtype = None,
    approximate: Approximate = False,
    rank: Rank = None,
    energy: Energy = None,
    with_records: Annotated[bool, typer.Option(help="Include its documents and the registered file.")] = False,
    step: Annotated[
        int | None, typer.Option(metavar="N", help="Training step of a saved adapter. Default: the final one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a registered adapter, verified, to another program's format."""
    from flows.cli.output import print_json
    from tasks.operations.documents import records_beside, write_documents
    from tasks.operations.export_adapter import export_version
    from tasks.operations.verify_files import write_export_statement

    approximation = {"rank": rank, "energy": energy} if approximate else None
    home = open_home()
    result = export_version(home, ref, to, output, base=base, dtype=dtype, approximation=approximation, step=step)
    documents = []
    if with_records:
        folder = records_beside(output)
        documents = write_documents(home, result.version, folder, with_adapter=True)
        files = [entry["file"] for entry in result.files]
        documents.append(write_export_statement(folder, result.version, result.sha256, files))
    if as_json:
        print_json({**vars(result), "records": documents})
        return
    for entry in [*result.files, *documents]:
        print(f"{entry['file']}  sha256 {entry['sha256']}")
    if result.approximation:
        print(f"approximated: keeps {result.approximation['retained']:.4%} of the squared norm")


def promote(
    ref: Ref,
    to: Annotated[str, typer.Option(metavar="ALIAS", help="Alias, such as production.")],
    reason: Reason,
    expect: Expect = None,
    override: Annotated[
        bool, typer.Option("--override", help="Override refusals that the policy lets you override; logged.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Point an alias at a version if its policy allows it. Undo with rollback."""
    from flows.cli.output import print_json
    from tasks.operations.promote import promote_version

    version, event, moved = promote_version(open_home(), ref, to, reason, expect=expect, override=override)
    if as_json:
        print_json({"ref": ref, "resolved": version.ref, "sha256": version.sha256, "moved": moved, "event": event})
        return
    print(f"{ref} is {version.ref}, sha256 {version.sha256[:16]}")
    if moved:
        _print_move(event)
    else:
        print(f"{to}: already there, since event {event.seq}; its policy is met")


def rollback(
    name: Annotated[str, typer.Argument(help="Adapter.")],
    alias: Annotated[str, typer.Option(help="Alias to roll back.")] = "production",
    to: Annotated[int | None, typer.Option(help="Version to return to. Default: the previous one.")] = None,
    to_event: Annotated[int | None, typer.Option(help="Event of the log whose result to return to.")] = None,
    reason: Reason = "rollback",
    as_json: Json = False,
) -> None:
    """Point an alias back at its previous version."""
    from flows.cli.output import print_json
    from tasks.operations.promote import roll_back

    event = roll_back(open_home(), name, alias, to, reason, to_event=to_event)
    if as_json:
        print_json(event)
    else:
        _print_move(event)


def describe(version: AdapterVersion, *, details: bool = False) -> dict[str, Any]:
    """Returns a version as a JSON object; with `details` also recipe, metrics, gates, parents and card."""
    summary: dict[str, Any] = {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "sha256": version.sha256,
        "size": version.size,
        "created_at": version.created_at,
        "passed": version.passed,
        "state": version.state,
    }
    if not details:
        return summary
    return summary | {
        "recipe": version.params,
        "metrics": version.metrics,
        "gates": version.gates,
        "parents": version.parents,
        "card": version.card,
        "artifact": version.artifact,
        "report": version.report,
        "run_id": version.run_id,
        "mlflow_run_id": version.mlflow_run_id,
    }


def _list_terms(source: dict[str, Any]) -> list[str]:
    terms = source["terms"]
    return [*terms["obligations"], *terms["restrictions"], *(f"unknown: {term}" for term in terms["unknown"])]


def _print_move(event: Event) -> None:
    before, after = (f"{event.name}@{number}" if number else "none" for number in (event.before, event.after))
    print(f"{event.alias}: {before} -> {after}  (event {event.seq})")
    for warning in event.details.get("warnings", ()):
        print(f"warning: {warning}")
