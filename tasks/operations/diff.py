"""Compares two versions or files: recipe, data, base, metrics, rights, environment and weights."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_engine.files import is_present, sha256_file
from registry.entities import AdapterVersion
from registry.errors import StoreError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from registry.store.snapshot import find_scratch
from tasks.operations.changes import Change, compare_records
from tasks.operations.promote import differ_in_embedder
from tasks.operations.report import read_manifest
from tasks.operations.reproduction_report import environment_of
from tasks.operations.upstream import UpstreamSteps, find_upstream_steps, resolve_version
from tasks.operations.weights import compare_weights, read_file_card


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        name: `name@version`, or the file.
        sha256: Digest of the adapter file.
        file: Path of the adapter file.
        card: The card in its header.
        version: The registered version; None for a file.
        upstream: The steps that made it; empty for a file.
        images: Digest -> source, caption and split of all images that it was trained on; digests only for a file, and
            None if nothing is known.
        note: What could not be read; empty if everything was.
    """

    name: str
    sha256: str
    file: Path
    card: Mapping[str, Any]
    version: AdapterVersion | None = None
    upstream: UpstreamSteps = field(default_factory=UpstreamSteps)
    images: Mapping[str, Mapping[str, Any]] | None = None
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """The differences of two versions or files. Lists hold only values that differ.

    Args:
        first: Name and digest of the first.
        second: Name and digest of the second.
        recipe: Settings of the adapter and of every upstream step.
        data: Images by digest, and changed captions.
        base: Name and fingerprint of the base.
        metrics: Values and intervals by metric.
        gates: Gates by metric.
        license: Licenses of the cards.
        parents: Names of the parents.
        environment: Environments of the steps that made the adapters.
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
        """Returns all of it as JSON values."""
        return asdict(self) | {"identical": self.first["sha256"] == self.second["sha256"]}


def diff(home: Home | None, first: str, second: str) -> Difference:
    """Compares two versions, two files, or one with the other.

    Args:
        home: The home with the versions; may be None for two files.
        first: `name@version`, `name@alias`, or the path of a file that exists.
        second: As `first`.

    Raises:
        AdapterError: A file is no valid adapter.
        RegistryError: A version does not exist, or its bytes are gone.
    """
    with tempfile.TemporaryDirectory(dir=find_scratch()) as folder:
        a, b = _side(home, first, Path(folder) / "first"), _side(home, second, Path(folder) / "second")
        weights = compare_weights(a.file, b.file, (_base_of(a), _base_of(b)))
    incomparable = _incomparable(a, b)
    return Difference(
        {"name": a.name, "sha256": a.sha256},
        {"name": b.name, "sha256": b.sha256},
        recipe=_recipe(a, b),
        data=_data(a, b),
        base=compare_records(_card_values(a, "base", "base_fingerprint"), _card_values(b, "base", "base_fingerprint")),
        metrics=compare_records(_metrics(a, incomparable), _metrics(b, incomparable)),
        gates=compare_records(_gates(a), _gates(b)),
        license=compare_records(_card_values(a, "license"), _card_values(b, "license")),
        parents=compare_records(_parents(a), _parents(b)),
        environment=_environment(a, b),
        weights=weights.as_json(),
        notes=[
            *(f"{side.name}: {side.note}" for side in (a, b) if side.note),
            *(f"{name}: measured with different embedders, so its values are not compared" for name in incomparable),
        ],
    )


def _side(home: Home | None, ref: str, folder: Path) -> Side:
    path = Path(ref)
    if home is None or is_present(path):
        card = read_file_card(path)
        digests: dict[str, dict[str, Any]] = {digest: {} for digest in card["data"]}
        return Side(ref, "" if path.is_dir() else sha256_file(path), path, card, images=digests or None)
    store, lineage = open_store(home), Lineage(home.lineage_url)
    try:
        version = resolve_version(lineage, ref)
        upstream = find_upstream_steps(lineage, version, through_versions=True)
    finally:
        lineage.close()
    file = folder / "adapter.safetensors"
    store.checkout_file(version.artifact, version.adapter_path, file)
    images, note = training_images(home, upstream)
    return Side(version.ref, version.sha256, file, version.card, version, upstream, images, note)


def training_images(home: Home, upstream: UpstreamSteps) -> tuple[dict[str, dict[str, Any]] | None, str]:
    """Returns the images of every dataset that an adapter was trained on, and a note if one cannot be read."""
    datasets = {
        ref
        for step in upstream.steps.values()
        if step.output is not None and step.output.kind == "adapter"
        for ref in step.inputs.values()
        if ref.kind == "manifest"
    }
    images: dict[str, dict[str, Any]] = {}
    for ref in sorted(datasets, key=lambda dataset: dataset.sha256):
        try:
            manifest = read_manifest(home, ref)
        except StoreError as error:
            return None, f"its dataset cannot be read ({error.problem})"
        for image in manifest.pictures:
            images[image.sha256] = {
                "source": image.source,
                "caption": " | ".join(image.captions),
                "split": image.split,
                "repeats": image.repeats,
            }
    return images or None, ""


def _data(first: Side, second: Side) -> list[Change]:
    if first.images is None or second.images is None:
        return []
    if first.version is not None and second.version is not None:
        return compare_records(first.images, second.images)
    # The header of a file lists only the digests of the images that it was trained on.
    changes = compare_records(_training_sources(first.images), _training_sources(second.images))
    return [change for change in changes if change.kind != "changed"]


def _training_sources(images: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {digest: image.get("source") for digest, image in images.items() if image.get("split", "train") == "train"}


def _recipe(first: Side, second: Side) -> list[Change]:
    changes = compare_records(_card_recipe(first), _card_recipe(second), "adapter.")
    if first.version is None or second.version is None:
        return changes  # a file has no lineage
    return [*changes, *compare_records(_upstream_settings(first), _upstream_settings(second))]


def _card_recipe(side: Side) -> dict[str, Any]:
    return {key: value for key, value in side.card.get("recipe", {}).items() if key != "parents"}


def _upstream_settings(side: Side) -> dict[str, Any]:
    """Returns the settings of the adapter's upstream steps."""
    return {
        f"step {name}": {**step.settings.get("settings", {}), "files": step.settings.get("files", {})}
        for name, step in side.upstream.steps.items()
        if side.version is not None and step.output != side.version.artifact and step.uses != "evaluate"
    }


def _card_values(side: Side, *keys: str) -> dict[str, Any]:
    return {key: side.card[key] for key in keys if side.card.get(key) is not None}


def _incomparable(first: Side, second: Side) -> list[str]:
    """Returns the metrics that were measured with different embedders."""
    before, after = (side.version.metrics if side.version else {} for side in (first, second))
    return [name for name in before if name in after and differ_in_embedder(before, after, name)]


def _metrics(side: Side, leave_out: Collection[str]) -> dict[str, Any]:
    """Returns, by metric, the adapter's value, its difference to the base, and the interval of the difference."""
    metrics = side.version.metrics if side.version else {}
    keys = ("adapter", "difference", "interval")
    return {
        name: {key: metric[key] for key in keys if key in metric}
        for name, metric in metrics.items()
        if name not in leave_out
    }


def _gates(side: Side) -> dict[str, Any]:
    gates = side.version.gates if side.version else ()
    return {_gate_name(gate): dict(gate) for gate in gates}


def _gate_name(gate: Mapping[str, Any]) -> str:
    against, on = gate.get("against", "base"), gate.get("on", "value")
    parts = [str(gate.get("of")), *([f"against {against}"] if against != "base" else [])]
    return f"{gate.get('metric')} ({', '.join([*parts, *([f'{on} bound'] if on != 'value' else [])])})"


def _parents(side: Side) -> dict[str, str]:
    parents = side.version.parents if side.version else side.card.get("recipe", {}).get("parents", [])
    return dict.fromkeys(map(str, parents), "parent")


def _environment(first: Side, second: Side) -> list[Change]:
    makers = [side.upstream.maker(side.version.artifact) if side.version else None for side in (first, second)]
    before, after = (None if maker is None else environment_of(maker) for maker in makers)
    return [] if before is None or after is None else compare_records(before, after)


def _base_of(side: Side) -> str | None:
    for step in side.upstream.steps.values():
        path = step.settings.get("base", {}).get("path")
        if path:
            return str(path)
    return side.card.get("base") or None
