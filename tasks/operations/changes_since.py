"""Lists what changed from the version in production to a newer one, without comparing weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from registry.entities import AdapterVersion, Execution
from registry.errors import UnknownName, UnknownVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.revocations import read_revoked
from tasks.operations.changes import Change, compare_records, show_value
from tasks.operations.diff import training_images
from tasks.operations.promote import compare_metrics
from tasks.operations.upstream import UpstreamSteps, find_upstream_steps, resolve_version

_SHOWN = 12


@dataclass(frozen=True)
class ProductionChanges:
    """What changed from the production version to another one.

    Attributes:
        production: `name@version` in production; None if there is none.
        version: `name@version` of the other one.
        added: Sources of the images that were added.
        removed: Sources of the images that were removed and are not revoked.
        revoked: Sources of the images that were revoked since.
        captions: Source -> caption before and after.
        base: Changes of the base model.
        recipe: Changed settings of all upstream steps.
        revisions: Step -> its revision before and after.
        metrics: Metric -> value in production and in the other version.
        notes: What could not be compared.
    """

    production: str | None
    version: str
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    revoked: tuple[str, ...] = ()
    captions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    base: tuple[Change, ...] = ()
    recipe: tuple[Change, ...] = ()
    revisions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yields label and text of each kind of change, in display order; nothing for what did not change."""
        if self.production is None:
            yield "production", "no version"
            return
        for label, sources in (("added", self.added), ("removed", self.removed), ("revoked", self.revoked)):
            if sources:
                yield f"images {label}", _list(sources)
        if self.captions:
            yield "captions", _list([f"{name}: {old!r} -> {new!r}" for name, (old, new) in self.captions.items()])
        for label, changes in (("base", self.base), ("recipe", self.recipe)):
            if changes:
                yield label, _list([_describe_change(change) for change in changes])
        if self.revisions:
            yield "engine", _list([f"revision of {step} {old} -> {new}" for step, (old, new) in self.revisions.items()])
        if self.metrics:
            shown = [f"{name} {_figure(old)} -> {_figure(new)}" for name, (old, new) in self.metrics.items()]
            yield "metrics", _list(shown)
        for note in self.notes:
            yield "note", note

    def to_markdown(self) -> str:
        """Returns the changes as a Markdown list."""
        if self.production is None:
            return f"**{self.version}**: no version is in production."
        lines = [f"- **{label}**: {text}" for label, text in self.facts()] or ["- nothing"]
        return "\n".join([f"**{self.production} -> {self.version}**", "", *lines])


def changes_since_production(
    home: Home, name: str, ref: str | int = "latest", *, alias: str = "production"
) -> ProductionChanges:
    """Compares a version with the one in production: images, captions, base, recipe, revisions, metrics.

    Args:
        home: The home with all state.
        name: The adapter.
        ref: Number or alias of the version.
        alias: The alias that is production.

    Raises:
        UnknownName: The adapter does not exist.
        UnknownVersion: The version does not exist.
    """
    with closing(Lineage(home.lineage_url)) as lineage:
        version = resolve_version(lineage, f"{name}@{ref}")
        try:
            before = resolve_version(lineage, f"{name}@{alias}")
        except (UnknownName, UnknownVersion):
            return ProductionChanges(None, version.ref)
    return compare_releases(home, before.ref, version.ref)


def compare_releases(home: Home, first: str, second: str) -> ProductionChanges:
    """Compares two versions without their weights; `first` is taken as the one in production.

    Args:
        home: The home with all state.
        first: `name@version` or `name@alias`.
        second: As `first`.

    Raises:
        UnknownName: An adapter does not exist.
        UnknownVersion: A version does not exist.
    """
    from registry.versions.versions import Versions

    with closing(Lineage(home.lineage_url)) as lineage:
        before, version = resolve_version(lineage, first), resolve_version(lineage, second)
        sides = [find_upstream_steps(lineage, side, through_versions=True) for side in (before, version)]
        revoked = frozenset(read_revoked(lineage))
    images, notes = _compare_images(home, (before, version), sides, revoked)
    with closing(Versions(home)) as versions:
        metrics = compare_metrics(versions, version, before.version)
    old, new = ({name: _settings(step) for name, step in side.steps.items()} for side in sides)
    return ProductionChanges(
        before.ref,
        version.ref,
        **images,
        base=tuple(compare_records(_base(before), _base(version))),
        recipe=tuple(compare_records(old, new)),
        revisions={
            step: (sides[0].steps[step].revision, execution.revision)
            for step, execution in sides[1].steps.items()
            if step in sides[0].steps and sides[0].steps[step].revision != execution.revision
        },
        metrics={name: values for name, values in sorted(metrics.items()) if values[0] != values[1]},
        notes=tuple(notes),
    )


def _compare_images(
    home: Home, versions: tuple[AdapterVersion, AdapterVersion], sides: list[UpstreamSteps], revoked: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    (old, first), (new, second) = (training_images(home, side) for side in sides)
    notes = [f"{version.ref}: {note}" for version, note in zip(versions, (first, second), strict=True) if note]
    if old is None or new is None:
        return {}, notes or [f"{versions[1].ref}: no dataset is recorded"]
    gone = [digest for digest in old if digest not in new]
    return {
        "added": tuple(new[digest]["source"] for digest in new if digest not in old),
        "removed": tuple(old[digest]["source"] for digest in gone if digest not in revoked),
        "revoked": tuple(old[digest]["source"] for digest in gone if digest in revoked),
        "captions": {
            new[digest]["source"]: (str(old[digest]["caption"]), str(new[digest]["caption"]))
            for digest in new
            if digest in old and old[digest]["caption"] != new[digest]["caption"]
        },
    }, notes


def _settings(step: Execution) -> dict[str, Any]:
    settings: dict[str, Any] = dict(step.settings.get("settings", {}))
    return {name: value for name, value in settings.items() if name != "base"}


def _base(version: AdapterVersion) -> dict[str, Any]:
    keys = ("base", "base_fingerprint")
    return {key: version.card[key] for key in keys if version.card.get(key) is not None}


def _describe_change(change: Change) -> str:
    return f"{change.path}: {show_value(change.before)} -> {show_value(change.after)}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _list(entries: Any) -> str:
    shown = list(entries)[:_SHOWN]
    more = len(entries) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])])
