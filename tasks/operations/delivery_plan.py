"""Compares a delivery target with the aliases: what to deliver, to recall and to remove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import queries
from registry.entities import AdapterVersion
from registry.errors import RegistryError
from registry.policy.conditions import judge_alias
from registry.policy.rights import revoked_upstream
from registry.store.chain import read_head, read_origin
from registry.store.tables import AliasRow, EventRow
from registry.versions.versions import Versions
from tasks.operations.delivery_file import DeliveryTarget
from tasks.operations.delivery_folder import TargetFolder
from tasks.operations.delivery_layout import LAYOUT_REVISION
from tasks.operations.delivery_manifest import (
    DeliveredFile,
    DeliveryManifest,
    find_owner,
    manifest_path,
    read_manifests,
)

ChangeAction = Literal["deliver", "recall", "remove", "confirm", "refuse"]
"""`recall` removes a version that its alias does not name any more, `remove` one that a newer version replaces;
`confirm` only updates the event of a manifest; `refuse` does nothing, because the version was revoked."""


@dataclass(frozen=True)
class DeliveryChange:
    """One difference between a target and the aliases.

    Args:
        action: What to do.
        target: Name of the target.
        name: The adapter.
        version: Its number.
        path: Path of the delivery in the target.
        event: Number of the event that decided.
        reason: Why.
        before: `name@version` that the path holds; empty for none.
        error: Why it is not done; empty if it is.
        alias: The alias of the target.
        home: Digest of the first event of the log.
        layout: Layout with its revision.
        manifest_path: Path of the manifest.
        manifest: The manifest that the target has; None for none.
    """

    action: ChangeAction
    target: str
    name: str
    version: int
    path: str
    event: int
    reason: str
    before: str = ""
    error: str = ""
    alias: str = field(default="", repr=False)
    home: str = field(default="", repr=False)
    layout: str = field(default="", repr=False)
    manifest_path: str = field(default="", repr=False)
    manifest: DeliveryManifest | None = field(default=None, repr=False)

    @property
    def ref(self) -> str:
        """Returns `name@version`."""
        return f"{self.name}@{self.version}"

    def as_json(self) -> dict[str, Any]:
        """Returns the change as JSON values."""
        names = ("action", "target", "name", "version", "path", "event", "alias", "reason", "before", "error")
        return {name: getattr(self, name) for name in names}

    def to_manifest(self, sha256: str, files: Mapping[str, DeliveredFile]) -> DeliveryManifest:
        """Returns the manifest of the finished delivery."""
        return DeliveryManifest(
            state="delivered",
            home=self.home,
            target=self.target,
            layout=self.layout,
            name=self.name,
            version=self.version,
            sha256=sha256,
            alias=self.alias,
            event=self.event,
            files=files,
        )


def plan_target(
    versions: Versions, target: DeliveryTarget, folder: TargetFolder, names: Sequence[str] = ()
) -> tuple[list[DeliveryChange], list[str]]:
    """Returns the differences between a target and the aliases, and the paths that are up to date.

    Args:
        versions: The registry.
        target: The target.
        folder: Its files.
        names: Adapters to compare; empty means all.

    Raises:
        DeliveryError: The target cannot be read.
    """
    manifests = read_manifests(folder, target)
    with versions.lineage.database.read() as session:
        plan = _Plan(versions, session, target, folder, manifests)
        changes = list(plan.compare())
    if names:
        changes = [change for change in changes if change.name in names]
    return changes, [path for path in plan.current if not names or manifests[path].name in names]


class _Plan:
    """The comparison of one target, within a reading session."""

    def __init__(
        self,
        versions: Versions,
        session: Session,
        target: DeliveryTarget,
        folder: TargetFolder,
        manifests: Mapping[str, DeliveryManifest],
    ) -> None:
        self.versions, self.session, self.target, self.folder = versions, session, target, folder
        self.manifests = manifests
        self.current: list[str] = []
        self.home = read_origin(session, EventRow.__table__)
        head = read_head(session, EventRow.__table__)
        self.head = head.seq if head else 0
        rows = session.scalars(select(AliasRow).where(AliasRow.alias == target.alias).order_by(AliasRow.name))
        self.moves = {row.name: (row.version, row.seq) for row in rows if target.matches(row.name)}

    def compare(self) -> Iterator[DeliveryChange]:
        """Yields the changes; recalls come first, because a revoked file must not wait for the next one."""
        wanted = {name: (number, event) for name, (number, event) in self.moves.items() if number is not None}
        yield from self._recalls(wanted)
        for name, (number, event) in wanted.items():
            yield from self._deliveries(queries.read_version(self.session, name, number), event)
        yield from self._removals(wanted)

    def _recalls(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[DeliveryChange]:
        for place, manifest in self.manifests.items():
            # A log that does not have the event is an old copy, which must not decide.
            if manifest.state == "withdrawn" or manifest.home != self.home or manifest.event > self.head:
                continue
            reason, event = self._reason_to_recall(manifest)
            if not reason and manifest.name in self.moves and manifest.name not in wanted:
                reason, event = f"{self.target.alias!r} points at no version", self.moves[manifest.name][1]
            if reason:
                yield self._change("recall", manifest.name, manifest.version, place, event, reason)

    def _reason_to_recall(self, manifest: DeliveryManifest) -> tuple[str, int]:
        try:
            version = queries.read_version(self.session, manifest.name, manifest.version)
        except RegistryError as error:
            return error.problem, self.head
        if version.state != "ACTIVE":
            return f"{version.ref} was {version.state.lower()}", self.head
        revoked = revoked_upstream(self.session, version)
        return ("; ".join(f"{subject} was revoked" for subject in revoked), self.head)

    def _deliveries(self, version: AdapterVersion, event: int) -> Iterator[DeliveryChange]:
        place = self._place(version.name, version.version)
        revoked = revoked_upstream(self.session, version)
        if revoked:
            # No failure: it would last until a user moves the alias.
            reason = f"{self.target.alias!r} points at it, but {'; '.join(revoked)} was revoked"
            yield self._change("refuse", version.name, version.version, place, event, reason)
            return
        manifest = self.manifests.get(place) or find_owner(self.folder, place)
        if manifest is not None and self._holds(manifest, version):
            if manifest.event < event:
                yield self._change("confirm", version.name, version.version, place, event, "the alias returned to it")
            else:
                self.current.append(place)
            return
        change = self._change("deliver", version.name, version.version, place, event, self._why(manifest, version))
        yield replace(change, error=self._obstacle(manifest, version, event))

    def _obstacle(self, manifest: DeliveryManifest | None, version: AdapterVersion, event: int) -> str:
        """Returns why the version may not be written to its path; empty if it may."""
        path = self.target.path_of(version.name, version.version)
        reasons = judge_alias(self.versions, version, self.target.alias, session=self.session).reasons
        if reasons:
            return f"{version.ref} may not be used: {'; '.join(reasons)}"
        if manifest is None:
            main = path if self.target.layout != "huggingface" else f"{path}/README.md"
            taken = self.folder.size(main) is not None
            return f"{path} exists, and Loraline did not deliver it: move it away" if taken else ""
        if (manifest.target, manifest.name) != (self.target.name, version.name):
            return f"{path} belongs to {manifest.name} of the target {manifest.target!r}: change `file` or `to`"
        if manifest.home != self.home:
            return f"{path} was delivered by another home: give each home a folder of its own"
        if manifest.event > max(event, self.head):
            return f"{path} has event {manifest.event}, and the log ends at {self.head}: restore the newest backup"
        newer = manifest.event > event and manifest.state != "withdrawn"
        return f"{path} was delivered by the newer event {manifest.event}" if newer else ""

    def _removals(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[DeliveryChange]:
        """Yields the earlier versions beyond `keep`, if their paths have the version in them."""
        for name, (number, event) in wanted.items():
            place = self._place(name, number)
            earlier = [
                (manifest.event, other)
                for other, manifest in self.manifests.items()
                if manifest.name == name and other != place and manifest.home == self.home
            ]
            for _, other in sorted(earlier, reverse=True)[self.target.keep - 1 :]:
                manifest = self.manifests[other]
                if manifest.state != "withdrawn" and not self._reason_to_recall(manifest)[0]:
                    yield self._change("remove", name, manifest.version, other, event, f"{name}@{number} replaces it")

    def _holds(self, manifest: DeliveryManifest, version: AdapterVersion) -> bool:
        """Returns True if a path has the files of a version, by its manifest and their sizes."""
        expected = (self.target.name, version.name, version.version, version.sha256, self._layout, self.home)
        actual = (manifest.target, manifest.name, manifest.version, manifest.sha256, manifest.layout, manifest.home)
        return (manifest.state, actual) == ("delivered", expected) and all(
            self.folder.size(path) == file.size for path, file in manifest.files.items()
        )

    def _why(self, manifest: DeliveryManifest | None, version: AdapterVersion) -> str:
        if manifest is None:
            return "the target does not have it"
        if manifest.state == "delivering":
            return "an earlier delivery was interrupted"
        if (manifest.ref, manifest.state) != (version.ref, "delivered"):
            return f"the target has {manifest.ref}, which is {manifest.state}"
        return "its layout changed" if manifest.layout != self._layout else "its files were changed or removed"

    @property
    def _layout(self) -> str:
        return f"{self.target.layout}-{LAYOUT_REVISION}"

    def _place(self, name: str, number: int) -> str:
        return manifest_path(self.target.path_of(name, number), self.target.layout)

    def _change(
        self, action: ChangeAction, name: str, number: int, place: str, event: int, reason: str
    ) -> DeliveryChange:
        manifest = self.manifests.get(place)
        return DeliveryChange(
            action,
            self.target.name,
            name,
            number,
            self.target.path_of(name, number),
            event,
            reason,
            before=manifest.ref if manifest is not None and manifest.state != "withdrawn" else "",
            alias=self.target.alias,
            home=self.home,
            layout=self._layout,
            manifest_path=place,
            manifest=manifest,
        )
