"""The verbs on versions: list, show, lineage, report, export, promote, rollback, fsck."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import Json, home_path

if TYPE_CHECKING:
    from registry.entities import AdapterVersion, Event
    from registry.home import Home

Ref = Annotated[str, typer.Argument(metavar="NAME@REF", help="name@version or name@alias.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the log.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    app.command("list")(list_versions)
    for verb in (show, lineage, report, export, promote, rollback, fsck):
        app.command()(verb)


def list_versions(
    name: Annotated[str | None, typer.Argument(help="Only this adapter.")] = None, as_json: Json = False
) -> None:
    """List registered adapters, their versions and aliases."""
    from flows.cli.output import print_json, print_table
    from registry.versions import Versions

    versions = Versions(_home()).list(name)
    if as_json:
        print_json([describe(version) for version in versions])
        return
    rows = [
        (
            v.name,
            v.version,
            ", ".join(v.aliases),
            _gates(v),
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
    from flows.promote import find_version
    from registry.versions import Versions

    version = find_version(Versions(_home()), ref)
    if as_json:
        print_json(describe(version, whole=True))
        return
    print_facts(
        [
            ("version", version.ref),
            ("aliases", ", ".join(version.aliases)),
            ("sha256", version.sha256),
            ("size", f"{version.size} bytes"),
            ("created", f"{version.created_at:%Y-%m-%d %H:%M:%S} UTC"),
            ("gates", _gates(version)),
            ("parents", ", ".join(version.parents)),
            ("MLflow run", version.mlflow_run_id),
        ]
    )
    if version.metrics:
        rows = [
            (name, *(f"{metric[key]:.4f}" for key in ("base", "adapter", "difference")), metric["better"])
            for name, metric in version.metrics.items()
        ]
        print_table(("metric", "base", "adapter", "difference", "better"), rows)
    if version.params:
        print_table(("recipe", ""), sorted(version.params.items()))


def lineage(
    ref: Annotated[str, typer.Argument(metavar="REF|DIGEST", help="name@ref, a run, or a digest of anything.")],
    down: Annotated[
        bool, typer.Option("--down", help="What was made from it, instead of what it was made from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Walk lineage, up to the pictures or down to the versions."""
    from flows.cli.output import print_json, print_table
    from registry.lineage import Lineage

    walk = Lineage(_home().lineage_url).walk(ref, "down" if down else "up", subjects=True)
    if as_json:
        print_json(walk)
        return
    print_table(("", "kind", "what", "digest or id"), [(n.depth, n.kind, n.label, n.id[:32]) for n in walk.nodes])


def report(
    ref: Ref, output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The file to write.")]
) -> None:
    """Write the report of a version as one HTML file."""
    from flows.errors import PipelineFailed
    from flows.reports import write_report

    if write_report(_home(), ref, output) is None:
        raise PipelineFailed(
            f"{ref} was never evaluated", remedy="add an evaluate step and hand its report to register"
        )
    print(output)


def export(
    ref: Ref,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="loraline, kohya, diffusers, peft, comfyui.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write into.")],
) -> None:
    """Write a registered adapter in another program's format."""
    import tempfile

    from flows.promote import find_version
    from lora_engine.files import sha256_file
    from lora_engine.formats import read_adapter, write_adapter
    from registry.versions import Versions

    versions = Versions(_home())
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "adapter.safetensors"
        versions.checkout_adapter(find_version(versions, ref), source)
        adapter, card = read_adapter(source)
        for path in write_adapter(output, adapter, format=to, card=card):
            print(f"{path}  sha256 {sha256_file(path)}")


def promote(
    ref: Ref, to: Annotated[str, typer.Option(metavar="ALIAS", help="The alias, such as production.")], reason: Reason
) -> None:
    """Give an alias to a version; refused unless its gates passed. Logged, and undone by rollback."""
    from flows.promote import promote_version

    event = promote_version(_home(), ref, to, reason)
    _print_move(event)


def rollback(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    alias: Annotated[str, typer.Option(help="The alias to take back.")] = "production",
    to: Annotated[int | None, typer.Option(help="A version; by default the one before.")] = None,
    reason: Reason = "rollback",
) -> None:
    """Take an alias back to where it was before."""
    from flows.promote import roll_back

    event = roll_back(_home(), name, alias, to, reason)
    _print_move(event)


def fsck(as_json: Json = False) -> None:
    """Prove that bytes, digests, events, aliases and MLflow agree."""
    from flows.cli.output import print_json, print_table
    from registry.audit import fsck as audit

    problems = audit(_home())
    if as_json:
        print_json(problems)
    elif problems:
        print_table(("problem", "where", "to do"), [(p.what, p.where, p.remedy) for p in problems])
    else:
        print("Everything agrees: bytes, digests, lineage, aliases, MLflow.")
    if any(problem.severity == "damage" for problem in problems):
        raise typer.Exit(1)


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


def _print_move(event: Event) -> None:
    before, after = event.before or "none", event.after or "none"
    print(f"{event.alias}: {event.name}@{before} -> {event.name}@{after}  (event {event.seq})")


def _gates(version: AdapterVersion) -> str:
    return {True: "passed", False: "FAILED", None: "not run"}[version.passed]


def _home() -> Home:
    from registry.home import Home

    return Home.open(home_path(), create=False)
