"""The verbs on versions: list, show, report, export, promote, rollback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import Json, open_home

if TYPE_CHECKING:
    from registry.entities import AdapterVersion, Event

Ref = Annotated[str, typer.Argument(metavar="NAME@REF", help="name@version or name@alias.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the log.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    app.command("list")(list_versions)
    for verb in (show, report, export, promote, rollback):
        app.command()(verb)


def list_versions(
    name: Annotated[str | None, typer.Argument(help="Only this adapter.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Deleted versions too.")] = False,
    as_json: Json = False,
) -> None:
    """List registered adapters, their versions and aliases."""
    from flows.cli.output import print_json, print_table
    from registry.versions.versions import Versions

    versions = Versions(open_home()).list(name, deleted=everything)
    if as_json:
        print_json([describe(version) for version in versions])
        return
    rows = [
        (
            v.name,
            v.version,
            ", ".join(v.aliases) if v.state == "ACTIVE" else v.state,
            v.gate_status,
            v.sha256[:16],
            f"{v.size / 1024:.0f} KiB",
            f"{v.created_at:%Y-%m-%d %H:%M}",
        )
        for v in versions
    ]
    print_table(("name", "version", "aliases", "gates", "sha256", "size", "created (UTC)"), rows)


def show(ref: Ref, as_json: Json = False) -> None:
    """Show one version: recipe, metrics, gates, parents, card."""
    from flows.cli.output import print_facts, print_json, print_table
    from registry.versions.versions import Versions
    from tasks.operations.promote import find_version
    from tasks.operations.rights import describe_rights

    versions = Versions(open_home())
    version = find_version(versions, ref)
    rights = describe_rights(versions, version)
    if as_json:
        print_json(describe(version, whole=True) | {"rights": rights})
        return
    print_facts(
        [
            ("version", version.ref),
            ("state", "" if version.state == "ACTIVE" else version.state),
            ("aliases", ", ".join(version.aliases)),
            ("sha256", version.sha256),
            ("size", f"{version.size} bytes"),
            ("created", f"{version.created_at:%Y-%m-%d %H:%M:%S} UTC"),
            ("gates", version.gate_status),
            ("parents", ", ".join(version.parents)),
            ("licences", ", ".join(rights["terms"]["licenses"])),
            ("commercial use", "allowed" if rights["commercial"] else "not allowed"),
            ("obligations", ", ".join(rights["terms"]["obligations"])),
            ("restrictions", ", ".join(rights["terms"]["restrictions"])),
            ("in the way", "; ".join(rights["conflicts"])),
            ("revoked", "; ".join(rights["revoked"])),
            ("MLflow run", version.mlflow_run_id),
        ]
    )
    if rights["sources"]:
        rows = [(entry["what"], entry["where"], ", ".join(_asked(entry))) for entry in rights["sources"]]
        print_table(("rights come from", "where", "which asks for or forbids"), rows)
    if version.metrics:
        rows = [
            (name, *(f"{metric[key]:.4f}" for key in ("base", "adapter", "difference")), metric["better"])
            for name, metric in version.metrics.items()
        ]
        print_table(("metric", "base", "adapter", "difference", "better"), rows)
    if version.params:
        print_table(("recipe", ""), sorted(version.params.items()))


def report(
    ref: Ref, output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The file to write.")]
) -> None:
    """Write the report of a version as one HTML file."""
    from tasks.errors import PipelineFailed
    from tasks.operations.report import write_report

    if write_report(open_home(), ref, output) is None:
        raise PipelineFailed(
            f"{ref} was never evaluated", remedy="add an evaluate step and hand its report to register"
        )
    print(output)


def export(
    ref: Ref,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="kohya, comfyui, diffusers, peft, lycoris, onetrainer, aitoolkit, cloneofsimo, loraline.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="FILE.safetensors, or a folder to write into.")
    ],
    base: Annotated[str | None, typer.Option(metavar="BASE", help="Where the format's names need one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    approximate: Annotated[bool, typer.Option(help="Write what FORMAT cannot hold as the nearest LoRA.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Of an approximation, the largest.")] = None,
    energy: Annotated[float | None, typer.Option(help="Of an approximation: share to keep, up to 1.")] = None,
    with_records: Annotated[
        bool, typer.Option(help="Also its documents, and the registered file they are about.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a registered adapter, verified, in another program's format."""
    from flows.cli.output import print_json
    from tasks.operations.documents import records_beside, write_documents
    from tasks.operations.export_adapter import export_version

    wanted = {"rank": rank, "energy": energy} if approximate else None
    done = export_version(open_home(), ref, to, output, base=base, dtype=dtype, approximation=wanted)
    documents = (
        write_documents(open_home(), done.version, records_beside(output), with_adapter=True) if with_records else []
    )
    if as_json:
        print_json({**vars(done), "records": documents})
        return
    for entry in [*done.files, *documents]:
        print(f"{entry['file']}  sha256 {entry['sha256']}")
    if done.approximation:
        print(f"approximated: {done.approximation['retained']:.4%} of the squared norm is kept")


def promote(
    ref: Ref,
    to: Annotated[str, typer.Option(metavar="ALIAS", help="The alias, such as production.")],
    reason: Reason,
    override: Annotated[
        bool, typer.Option("--override", help="Set reasons aside, where the policy lets you; they stay in the log.")
    ] = False,
) -> None:
    """Give an alias to a version; refused with all reasons unless its policy is met. Logged; undone by rollback."""
    from tasks.operations.promote import promote_version

    event = promote_version(open_home(), ref, to, reason, override=override)
    _print_move(event)


def rollback(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    alias: Annotated[str, typer.Option(help="The alias to take back.")] = "production",
    to: Annotated[int | None, typer.Option(help="A version; by default the one before.")] = None,
    to_event: Annotated[int | None, typer.Option(help="As the alias was right after this event of the log.")] = None,
    reason: Reason = "rollback",
) -> None:
    """Take an alias back to where it was before."""
    from tasks.operations.promote import roll_back

    event = roll_back(open_home(), name, alias, to, reason, to_event=to_event)
    _print_move(event)


def describe(version: AdapterVersion, *, whole: bool = False) -> dict[str, Any]:
    """A version as a JSON object; with `whole`, its recipe, metrics, gates, parents and card too."""
    short: dict[str, Any] = {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "sha256": version.sha256,
        "size": version.size,
        "created_at": version.created_at,
        "passed": version.passed,
        "state": version.state,
    }
    if not whole:
        return short
    return short | {
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


def _asked(source: dict[str, Any]) -> list[str]:
    terms = source["terms"]
    return [*terms["obligations"], *terms["restrictions"], *(f"unknown: {what}" for what in terms["unknown"])]


def _print_move(event: Event) -> None:
    before, after = event.before or "none", event.after or "none"
    print(f"{event.alias}: {event.name}@{before} -> {event.name}@{after}  (event {event.seq})")
