"""Describes the registered adapters that a server offers: versions, aliases, trigger words, license, a sample."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from registry.entities import AdapterVersion
from registry.errors import StoreError, UnknownVersion
from registry.home import Home
from registry.versions.versions import Versions
from tasks.operations.promote import find_version

_SAMPLES = "pictures/"


@dataclass(frozen=True)
class ServedVersion:
    """A version for those who choose one.

    Attributes:
        name: The adapter.
        version: Its number.
        aliases: Aliases that point at it.
        triggers: Its trigger words.
        license: Its license, an SPDX expression; empty if unknown.
        base: Its base model; empty if unknown.
        gates: Result of its gates.
        has_sample: True if its report has an image.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    triggers: tuple[str, ...]
    license: str
    base: str
    gates: str
    has_sample: bool


class AdapterCards:
    """The cards of a home; may be used by several threads.

    Args:
        home: The home.
    """

    def __init__(self, home: Home) -> None:
        self._versions, self._lock = Versions(home), threading.Lock()
        self._samples: dict[str, str | None] = {}

    def cards(self, name: str | None = None) -> tuple[ServedVersion, ...]:
        """Returns the cards of the active versions of an adapter, or of all, by name and number."""
        with self._lock:
            return tuple(self._card(version) for version in self._versions.list(name) if version.state == "ACTIVE")

    def sample(self, ref: str) -> bytes:
        """Returns the sample image of a version, a PNG file.

        Raises:
            UnknownVersion: There is no such version, or it has no sample.
            GoneVersion: It was withdrawn or deleted.
        """
        with self._lock:
            version = self._versions.require_active(find_version(self._versions, ref))
            path = self._sample_of(version)
            if path is None or version.report is None:
                raise UnknownVersion("has no sample image", where=version.ref)
            return self._versions.store.read(version.report, path)

    def close(self) -> None:
        """Closes the registry."""
        self._versions.close()

    def _card(self, version: AdapterVersion) -> ServedVersion:
        card = version.card
        triggers = [word.strip() for word in str(card.get("trigger") or "").split(",")]
        return ServedVersion(
            version.name,
            version.version,
            version.aliases,
            tuple(filter(None, triggers)),
            str(card.get("license") or ""),
            str(card.get("base") or ""),
            version.gate_status,
            self._sample_of(version) is not None,
        )

    def _sample_of(self, version: AdapterVersion) -> str | None:
        """Returns the path of an image in the report of a version, by the report's digest once."""
        if version.report is None:
            return None
        key = version.report.sha256
        if key not in self._samples:
            try:
                files = self._versions.store.files(version.report)
            except StoreError:  # the bytes are missing; the version is listed all the same
                return None
            images = sorted(path for path in files if path.startswith(_SAMPLES) and path.endswith(".png"))
            self._samples[key] = images[0] if images else None
        return self._samples[key]
