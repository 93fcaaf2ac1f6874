"""`register`: an adapter and its report become a version with a number; the gates decide about its alias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from lora_engine.files import atomic_write, canonical_json
from registry.home import Home
from tasks.spec import StepSpec, Takes
from tasks.step import Context, step


class Register(StepSpec):
    """Under which name, and which alias to ask for."""

    uses: Literal["register"] = "register"
    name: str
    adapter: Annotated[str, Takes("adapter")]
    report: Annotated[str | None, Takes("report")] = None
    alias: str | None = None


def still_registered(spec: Register, home: Home, folder: Path) -> bool:
    """Whether the version is there, whole, and has the alias that was asked for (unless the gates refused it)."""
    from registry.errors import RegistryError
    from registry.versions import Versions

    said = json.loads((folder / "version.json").read_bytes())
    try:
        version = Versions(home).get(said["name"], str(said["version"]))
    except RegistryError:
        return False
    wanted = spec.alias is not None and not said["refused"]
    return version.sha256 == said["sha256"] and (not wanted or spec.alias in version.aliases)


@step(Register, gives="version", revision=1, holds=still_registered)
def register(spec: Register, context: Context) -> None:
    """Registers the adapter with its curves, metrics, pictures and report; writes `version.json`."""
    from lora_engine.evaluation.report import load_report
    from lora_engine.formats import read_adapter
    from registry.versions import Versions

    adapter_folder, report_folder = context.folder("adapter"), context.optional("report")
    _, card = read_adapter(adapter_folder / "adapter.safetensors")
    report = load_report(report_folder) if report_folder else None
    registered = Versions(context.home).register(
        spec.name,
        context.refs["adapter"][0],
        report=context.refs["report"][0] if report_folder else None,
        run_id=context.run_id,
        card=card.model_dump(mode="json"),
        params=card.recipe,
        metrics=report["metrics"] if report else {},
        gates=report["gates"] if report else [],
        passed=report["passed"] if report else None,
        curves=read_curves(adapter_folder),
        pictures=dict(_pictures(report_folder)) if report_folder else {},
        alias=spec.alias,
    )
    said: dict[str, Any] = {"name": spec.name, "version": registered.version.version, "sha256": registered.version.sha256}
    said |= {"alias": spec.alias, "refused": list(registered.refused)}
    atomic_write(context.out / "version.json", canonical_json(said))


def read_curves(adapter_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a training: name -> (step, value) points; none for an adapter that was not trained here."""
    path = adapter_folder / "training.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_bytes())
    return {
        name: [(int(at), float(value)) for at, value in record[name]]
        for name in ("loss", "lr", "validation_loss")
        if record.get(name)
    }


def _pictures(report_folder: Path) -> list[tuple[str, Path]]:
    return [(path.name, path) for path in sorted((report_folder / "pictures").glob("*.png"))]
