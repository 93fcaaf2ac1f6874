"""Makes delivery targets hold the versions that their aliases point at; removes what was withdrawn.

A delivery compares the targets with the aliases, so it can be repeated, missed and interrupted. Each target has a lock
in the home, and each delivered adapter a manifest, which is written before and after its files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from lora_engine.errors import EngineError
from lora_engine.files import sha256_file
from registry import event_log
from registry.errors import RegistryError
from registry.home import Home
from registry.store.redaction import redact
from registry.versions.versions import Versions
from tasks.content import read_contents
from tasks.errors import DeliveryError
from tasks.operations.delivery_file import DeliveryTarget, locate_target, read_delivery
from tasks.operations.delivery_folder import TargetFolder, open_target
from tasks.operations.delivery_layout import build_layout
from tasks.operations.delivery_manifest import DeliveredFile, DeliveryManifest, read_manifests
from tasks.operations.delivery_plan import DeliveryChange, plan_target
from tasks.operations.results import record_result

_logger = logging.getLogger(__name__)
_LOCK_SECONDS = 600.0


@dataclass(frozen=True)
class TargetReport:
    """Result of a delivery to one target.

    Args:
        target: Its name.
        to: Its location, without secrets.
        changes: What differed from the aliases; done unless it was a dry run, or the change has an error.
        current: Paths that held the right version already.
        error: Why the target could not be compared; empty if it could.
    """

    target: str
    to: str
    changes: tuple[DeliveryChange, ...] = ()
    current: tuple[str, ...] = ()
    error: str = ""

    @property
    def problems(self) -> list[str]:
        """Returns the errors of the target and of its changes."""
        return [*filter(None, [self.error]), *(f"{c.name}: {c.error}" for c in self.changes if c.error)]

    def as_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        changes = [change.as_json() for change in self.changes]
        return vars(self) | {"changes": changes, "current": list(self.current), "problems": self.problems}


def deliver_adapters(
    home: Home, names: Sequence[str] = (), target: str | None = None, *, dry_run: bool = False
) -> list[TargetReport]:
    """Delivers, recalls and removes what differs from the aliases, in all targets of `delivery.yaml`.

    Args:
        home: The home with all state.
        names: Adapters to deliver; empty means all that a target matches.
        target: Name of a target; None means all.
        dry_run: True reports what differs, and writes nothing.

    Returns:
        A report per target. A target that fails does not stop the others; its report has the error.

    Raises:
        SpecError: `delivery.yaml` is invalid, or has no such target.
    """
    settings = read_delivery(home)
    with closing(Versions(home)) as versions:
        return [_deliver_target(versions, entry, names, dry_run=dry_run) for entry in settings.select(target)]


def _deliver_target(versions: Versions, target: DeliveryTarget, names: Sequence[str], *, dry_run: bool) -> TargetReport:
    report = TargetReport(target.name, target.to)
    try:
        folder = open_target(locate_target(versions.home, target))
        report = replace(report, to=folder.where)
        if dry_run:
            return _compare(report, versions, target, folder, names)
        with versions.home.lock(f"deliver-{target.name}", timeout=_LOCK_SECONDS):
            report = _compare(report, versions, target, folder, names)
            done = tuple(_apply(versions, target, folder, change) for change in report.changes)
        return replace(report, changes=done)
    except Timeout:
        return replace(report, error=f"another process has delivered to it for {_LOCK_SECONDS:.0f} s")
    except (EngineError, RegistryError, OSError) as error:
        return replace(report, error=redact(str(error)))


def _compare(
    report: TargetReport, versions: Versions, target: DeliveryTarget, folder: TargetFolder, names: Sequence[str]
) -> TargetReport:
    folder.require()
    changes, current = plan_target(versions, target, folder, names)
    return replace(report, changes=tuple(changes), current=tuple(current))


def _apply(versions: Versions, target: DeliveryTarget, folder: TargetFolder, change: DeliveryChange) -> DeliveryChange:
    """Makes one change; returns it with the error if it failed."""
    try:
        if change.error:
            return change
        if change.action == "deliver":
            _publish(versions, target, folder, change)
        elif change.action in {"recall", "remove"}:
            _remove(versions, target, folder, change)
        elif change.action == "confirm" and change.manifest is not None:
            folder.write(change.manifest_path, change.manifest.model_copy(update={"event": change.event}).encode())
    except (EngineError, RegistryError, OSError) as error:
        _logger.warning("%s: %s of %s failed: %s", target.name, change.action, change.ref, error)
        return replace(change, error=redact(str(error)))
    _logger.info("%s: %s %s (event %s)", target.name, change.action, change.ref, change.event)
    return change


def _publish(versions: Versions, target: DeliveryTarget, folder: TargetFolder, change: DeliveryChange) -> None:
    version, path = versions.show(change.name, change.version), change.path
    with versions.home.temporary_folder(version.size) as scratch:
        built = build_layout(versions, version, target.layout, path, scratch)
        files = {
            file: DeliveredFile(sha256=sha256_file(scratch / file), size=(scratch / file).stat().st_size)
            for file in built
        }
        manifest = change.to_manifest(version.sha256, files)
        # Building takes long: another delivery, or a withdrawal, may have come first.
        _require_newest(versions, target, folder, change)
        manifests = read_manifests(folder, target)
        _require_free(folder, manifests, change.name, built)
        folder.write(change.manifest_path, manifest.model_copy(update={"state": "delivering"}).encode())
        for file in built:
            folder.write(file, scratch / file)
        if change.manifest is not None:
            for file in change.manifest.files.keys() - files.keys() - _files_of_others(manifests, change):
                folder.delete(file)
        _record(versions, target, folder, manifest, scratch)
        folder.write(change.manifest_path, manifest.encode())


def _require_newest(versions: Versions, target: DeliveryTarget, folder: TargetFolder, change: DeliveryChange) -> None:
    """Raises DeliveryError if the alias moved, or if the target has a newer event."""
    current = {entry.path: entry for entry in plan_target(versions, target, folder, [change.name])[0]}
    now = current.get(change.path)
    if now is None or (now.action, now.version, now.event) != (change.action, change.version, change.event):
        raise DeliveryError(
            f"{change.ref} is not to be delivered any more: {target.alias!r} moved meanwhile",
            where=folder.where,
            remedy="deliver again",
        )


def _require_free(
    folder: TargetFolder, manifests: Mapping[str, DeliveryManifest], name: str, files: Iterable[str]
) -> None:
    """Raises DeliveryError if a file that a version brings is there, and no delivery of its adapter brought it.

    The file of a learned token has the name of the token, which another adapter may have, too.
    """
    own = {file for manifest in manifests.values() if manifest.name == name for file in manifest.files}
    taken = next((file for file in files if file not in own and folder.size(file) is not None), None)
    if taken is not None:
        raise DeliveryError(
            f"{taken} exists, and no delivery of {name} brought it",
            where=folder.where,
            remedy="move it away, or change `to`",
        )


def _files_of_others(manifests: Mapping[str, DeliveryManifest], change: DeliveryChange) -> set[str]:
    """Returns the files that other deliveries of the target have, such as those of a token of another version."""
    others = (manifest for place, manifest in manifests.items() if place != change.manifest_path)
    return {file for manifest in others if manifest.state != "withdrawn" for file in manifest.files}


def _record(
    versions: Versions, target: DeliveryTarget, folder: TargetFolder, manifest: DeliveryManifest, scratch: Path
) -> None:
    """Logs the delivery as an export, once per event: a revocation then lists the files."""
    version = versions.show(manifest.name, manifest.version)
    files = [
        {"file": f"{folder.where.rstrip('/')}/{path}", "sha256": file.sha256}
        for path, file in manifest.files.items()
        if path.endswith(".safetensors")
    ]
    delivery = _identify(folder, manifest)
    if _last_entry(versions, manifest, delivery) == "export":
        return
    versions.log_export(version, {"format": manifest.layout, "files": files, "delivery": delivery})
    written = [scratch / path for path in manifest.files if path.endswith(".safetensors")]
    source = {version.artifact.sha256: version.artifact}
    settings = {"version": version.ref, "format": manifest.layout, "target": target.name}
    record_result(versions, "export", source, written, read_contents(written, None, None), settings)


def _identify(folder: TargetFolder, manifest: DeliveryManifest) -> dict[str, str | int]:
    return {"target": manifest.target, "to": folder.where, "event": manifest.event}


def _last_entry(versions: Versions, manifest: DeliveryManifest, delivery: Mapping[str, str | int]) -> str:
    """Returns `export` or `recall`, what the log last has about a delivery; empty for nothing."""
    with versions.lineage.database.read() as session:
        events = event_log.read_events(session, manifest.name)
    actions = [event.action for event in events if event.details.get("delivery") == delivery]
    return actions[-1] if actions else ""


def _remove(versions: Versions, target: DeliveryTarget, folder: TargetFolder, change: DeliveryChange) -> None:
    manifest = change.manifest
    if manifest is None:
        return
    for path in manifest.files.keys() - _files_of_others(read_manifests(folder, target), change):
        folder.delete(path)
    if change.action == "remove":
        folder.delete(change.manifest_path)
        return
    delivery = _identify(folder, manifest)
    if _last_entry(versions, manifest, delivery) != "recall":
        versions.log_recall(versions.show(manifest.name, manifest.version), change.reason, {"delivery": delivery})
    withdrawn = {"state": "withdrawn", "event": max(change.event, manifest.event), "reason": change.reason, "files": {}}
    folder.write(change.manifest_path, manifest.model_copy(update=withdrawn).encode())
