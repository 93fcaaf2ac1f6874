"""`diff`: how two versions, or files, differ: recipe, data, base, figures, rights, surroundings and weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_engine.files import sha256_file
from registry.entities import AdapterVersion
from registry.errors import StoreError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.operations.changes import Change, compare_records
from tasks.operations.report import read_manifest
from tasks.operations.reproduction_report import environment_of
from tasks.operations.upstream import Trace, read_version, trace
from tasks.operations.weights import compare_weights, read_card


@dataclass(frozen=True)
class Side:
    """One of the two.

    Args:
        name: `name@version`, or the file.
        sha256: Digest of the adapter file.
        file: Where it can be read.
        card: What it says of itself.
        version: What the registry knows of it; None for a file.
        found: Where it comes from; empty for a file.
        pictures: Digest -> source, caption and split, of all datasets that it was made from; of a file the digests
            alone, and None where nothing is known.
        note: What could not be read of that.
    """

    name: str
    sha256: str
    file: Path
    card: Mapping[str, Any]
    version: AdapterVersion | None = None
    found: Trace = field(default_factory=Trace)
    pictures: Mapping[str, Mapping[str, Any]] | None = None
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """How they differ. Every list holds only what is not the same.

    Args:
        first: Name and digest of the first.
        second: Name and digest of the second.
        recipe: Settings, of the adapter and of every step before it.
        data: Images by digest, and changed captions.
        base: Name and fingerprint.
        metrics: Per metric the figures with their intervals.
        gates: By metric.
        license: Of the cards.
        parents: What each was made from by name.
        environment: What the adapters' own steps ran on.
        weights: See `compare_adapters`.
        notes: What could not be compared.
    """

    first: dict[str, str]
    second: dict[str, str]
    recipe: list[Change]
    data: list[Change]
    base: list[Change]
    metrics: list[Change]
    gates: list[Change]
    license: list[Change]
    parents: list[Change]
    environment: list[Change]
    weights: dict[str, Any]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self) | {"identical": self.first["sha256"] == self.second["sha256"]}


def diff(home: Home | None, first: str, second: str) -> Difference:
    """Compares two versions, two files, or one with the other.

    Args:
        home: The home that knows the versions; may be None for two files.
        first: `name@version`, `name@alias`, or the path of a file that exists.
        second: Likewise.

    Raises:
        AdapterError: A file is no adapter, or not whole.
        RegistryError: No such version, or its bytes are gone.
    """
    with tempfile.TemporaryDirectory() as folder:
        one, other = _side(home, first, Path(folder) / "first"), _side(home, second, Path(folder) / "second")
        weights = compare_weights(one.file, other.file, (_base_of(one), _base_of(other)))
    return Difference(
        {"name": one.name, "sha256": one.sha256},
        {"name": other.name, "sha256": other.sha256},
        recipe=_recipe(one, other),
        data=_data(one, other),
        base=compare_records(_picked(one, "base", "base_fingerprint"), _picked(other, "base", "base_fingerprint")),
        metrics=compare_records(_metrics(one), _metrics(other)),
        gates=compare_records(_gates(one), _gates(other)),
        license=compare_records(_picked(one, "license"), _picked(other, "license")),
        parents=compare_records(_parents(one), _parents(other)),
        environment=_environment(one, other),
        weights=weights.as_json(),
        notes=[f"{side.name}: {side.note}" for side in (one, other) if side.note],
    )


def _side(home: Home | None, ref: str, folder: Path) -> Side:
    path = Path(ref)
    if home is None or path.exists():
        card = read_card(path)
        data: dict[str, dict[str, Any]] = {digest: {} for digest in card["data"]}
        return Side(ref, "" if path.is_dir() else sha256_file(path), path, card, pictures=data or None)
    store, lineage = open_store(home), Lineage(home.lineage_url)
    try:
        version = read_version(lineage, ref)
        found = trace(lineage, version, through_versions=True)
    finally:
        lineage.close()
    file = folder / "adapter.safetensors"
    store.checkout_file(version.artifact, version.adapter_path, file)
    pictures, note = _images(home, found)
    return Side(version.ref, version.sha256, file, version.card, version, found, pictures, note)


def _images(home: Home, found: Trace) -> tuple[dict[str, dict[str, Any]] | None, str]:
    """The pictures of every dataset that an adapter was trained on, with their captions."""
    datasets = {
        ref
        for step in found.steps.values()
        if step.output is not None and step.output.kind == "adapter"
        for ref in step.inputs.values()
        if ref.kind == "manifest"
    }
    pictures: dict[str, dict[str, Any]] = {}
    for ref in sorted(datasets, key=lambda each: each.sha256):
        try:
            manifest = read_manifest(home, ref)
        except StoreError as error:
            return None, f"its dataset cannot be read ({error.problem})"
        for picture in manifest.pictures:
            said = {"source": picture.source, "caption": picture.caption, "split": picture.split}
            pictures[picture.sha256] = said | {"repeats": picture.repeats}
    return pictures or None, ""


def _data(one: Side, other: Side) -> list[Change]:
    if one.pictures is None or other.pictures is None:
        return []
    if one.version is not None and other.version is not None:
        return compare_records(one.pictures, other.pictures)
    # A file names the pictures that it was trained on, and nothing of them but their digests.
    changes = compare_records(_trained_on(one.pictures), _trained_on(other.pictures))
    return [change for change in changes if change.kind != "changed"]


def _trained_on(pictures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {digest: said.get("source") for digest, said in pictures.items() if said.get("split", "train") == "train"}


def _recipe(one: Side, other: Side) -> list[Change]:
    changes = compare_records(_made_by(one), _made_by(other), "adapter.")
    if one.version is None or other.version is None:
        return changes  # of a file nothing is known but what its header says
    return [*changes, *compare_records(_steps_before(one), _steps_before(other))]


def _made_by(side: Side) -> dict[str, Any]:
    return {key: value for key, value in side.card.get("recipe", {}).items() if key != "parents"}


def _steps_before(side: Side) -> dict[str, Any]:
    """The settings of the steps that led to the adapter."""
    return {
        f"step {name}": {**step.settings.get("settings", {}), "files": step.settings.get("files", {})}
        for name, step in side.found.steps.items()
        if side.version is not None and step.output != side.version.artifact and step.uses != "evaluate"
    }


def _picked(side: Side, *keys: str) -> dict[str, Any]:
    return {key: side.card[key] for key in keys if side.card.get(key) is not None}


def _metrics(side: Side) -> dict[str, Any]:
    """Metric by metric: the adapter's figure, its difference to the base, and the interval of that."""
    found = side.version.metrics if side.version else {}
    return {name: [metric.get(key) for key in ("adapter", "difference", "interval")] for name, metric in found.items()}


def _gates(side: Side) -> dict[str, Any]:
    gates = side.version.gates if side.version else ()
    return {f"{gate.get('metric')} ({gate.get('of')})": dict(gate) for gate in gates}


def _parents(side: Side) -> dict[str, str]:
    named = side.version.parents if side.version else side.card.get("recipe", {}).get("parents", [])
    return dict.fromkeys(map(str, named), "parent")


def _environment(one: Side, other: Side) -> list[Change]:
    first, second = (side.found.maker(side.version.artifact) if side.version else None for side in (one, other))
    if first is None or second is None:
        return []
    return compare_records(environment_of(first), environment_of(second))


def _base_of(side: Side) -> str | None:
    for step in side.found.steps.values():
        path = step.settings.get("base", {}).get("path")
        if path:
            return str(path)
    return side.card.get("base") or None
