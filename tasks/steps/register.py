"""Defines the step `register`: registers an adapter and its report as a version; the gates decide about its alias."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from lora_engine.files import atomic_write, canonical_json
from lora_engine.settings import AddedLater
from registry.home import Home
from tasks.spec import Input, StepSpec
from tasks.step import Context, always, step
from tasks.sweep.spec import SWEEP, SweepWinner


class Register(StepSpec):
    """The adapter, its report, the name to register, and the alias to request.

    Attributes:
        sweep: The sweep that chose its settings; set by `loraline sweep`.
    """

    uses: Literal["register"] = "register"
    name: str
    adapter: Annotated[str, Input("adapter")]
    report: Annotated[str | None, Input("report")] = None
    alias: str | None = None
    sweep: Annotated[SweepWinner | None, AddedLater()] = None


def is_still_registered(home: Home, summary: bytes) -> bool:
    """Returns True if the registry has the version, whatever its state and alias are now."""
    from registry.errors import RegistryError
    from registry.versions.versions import Versions

    registered = json.loads(summary)
    versions = Versions(home)
    try:
        return versions.show(registered["name"], registered["version"]).sha256 == str(registered["sha256"])
    except RegistryError:
        return False
    finally:
        versions.close()


@step(
    Register,
    produces="version",
    revision=2,
    summary="version.json",
    is_still_valid=is_still_registered,
    imports=always("lora_engine.formats", "registry.versions.versions"),
)
def register(spec: Register, context: Context) -> None:
    """Registers the adapter with its curves, metrics and images; writes `version.json`."""
    from lora_engine.formats import read_bundle
    from registry.versions.versions import Versions

    adapter_folder, report_folder = context.folder("adapter"), context.optional("report")
    card = read_bundle(adapter_folder / "adapter.safetensors").card
    if spec.sweep is not None:
        done = {**card.recipe.get("done", {}), SWEEP: spec.sweep.describe()}
        card = card.model_copy(update={"recipe": {**card.recipe, "done": done}})
    report = json.loads((report_folder / "report.json").read_bytes()) if report_folder else {}
    versions = Versions(context.home)
    version = versions.register(
        spec.name,
        context.refs["adapter"][0],
        report=context.refs["report"][0] if report_folder else None,
        run_id=context.run_id,
        card=card.model_dump(mode="json"),
        metrics=report.get("metrics"),
        gates=report.get("gates", ()),
        passed=report.get("passed"),
        parents=card.recipe.get("parents", ()),
        alias_request=spec.alias,
        curves=read_curves(adapter_folder),
        params=flatten(card.recipe),
        pictures=dict(_images(adapter_folder, report_folder)),
    )
    registered = {"name": spec.name, "version": version.version, "sha256": version.sha256}
    atomic_write(context.out / "version.json", canonical_json(registered))


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to `a.b` -> value, for MLflow's parameters."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def read_curves(adapter_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the curves of a training, name -> (step, value) points; empty if it was not trained here."""
    path = adapter_folder / "training.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_bytes())
    return {
        name: [(int(step), float(value)) for step, value in record[name]]
        for name in ("loss", "lr", "validation_loss")
        if record.get(name)
    }


def _images(adapter_folder: Path, report_folder: Path | None) -> Iterator[tuple[str, Path]]:
    """Yields the images of the report, and the samples that were drawn during training."""
    for path in sorted((report_folder / "pictures").glob("*.png")) if report_folder else ():
        yield path.name, path
    for path in sorted(adapter_folder.glob("samples/step-*/*.png")):
        yield path.relative_to(adapter_folder).as_posix(), path
