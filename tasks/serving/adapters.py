"""Finds the adapters that requests name, and keeps their files while they are used."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from lora_engine.errors import WordedError
from lora_engine.files import sha256_file
from registry.entities import AdapterVersion
from registry.errors import Refused, RegistryError
from registry.home import Home
from registry.policy.rights import revoked_upstream
from registry.refs import LATEST, can_exist, split_ref
from registry.store.chain import read_head
from registry.store.tables import EventRow
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.operations.promote import find_usable

DEFAULT_ALIAS = "production"
"""The alias of a reference that is a name alone."""


class ServedAdapters:
    """The adapters of a registry as files, by digest; its methods may be called from several threads.

    Every answer is from the registry as it is now, so a moved alias or a withdrawal counts at the next request.

    Args:
        home: The home with the versions.
        folder: The folder for their files.
        limit: Size of the files in bytes that `trim` leaves.
    """

    def __init__(self, home: Home, folder: Path, limit: int = 4 << 30) -> None:
        self._versions, self._folder, self._limit = Versions(home), folder, limit
        self._lock = threading.RLock()
        self._verified: set[str] = set()
        self._files: dict[str, Path] = {}
        self._cursor = -1
        self.hits = self.misses = 0
        folder.mkdir(parents=True, exist_ok=True)

    def resolve(self, reference: str) -> str:
        """Returns the `name@version` of an adapter that may be used now.

        Args:
            reference: `name@version` or `name@alias`; `name` alone means `name@production`.

        Raises:
            SpecError: The reference is none of these; requests name registered adapters only.
            RegistryError: No such version, or it may not be used: it is withdrawn or revoked, or does not meet the
                policy of the alias.
        """
        return self._find(reference).ref

    def fetch(self, reference: str) -> tuple[Path, str]:
        """Returns the file and the `name@version` of an adapter that may be used now; raises as `resolve` does."""
        version = self._find(reference)
        with self._lock:
            return self._checkout(version), version.ref

    def find_unusable(self, references: Iterable[str]) -> tuple[dict[str, WordedError], list[Path]]:
        """Finds versions that were withdrawn, revoked or deleted since the last call.

        Reads one number from the registry unless something changed there.

        Args:
            references: `name@version` of the adapters that waiting jobs need.

        Returns:
            The unusable ones with the reason, of these and of all whose files were fetched; and the files that were
            deleted therefore.
        """
        with self._lock:
            with self._versions.lineage.database.read() as session:
                head = read_head(session, EventRow.__table__)
            cursor = 0 if head is None else head.seq
            if cursor == self._cursor:
                return {}, []
            self._cursor = cursor
            unusable: dict[str, WordedError] = {}
            for reference in {*references, *self._files}:
                try:
                    self._find(reference)
                except RegistryError as error:
                    unusable[reference] = error
            files = {self._files.pop(reference) for reference in unusable if reference in self._files}
            gone = sorted(files - {*self._files.values()})  # another version may have the same bytes
            for file in gone:
                self._verified.discard(file.name)
                file.unlink(missing_ok=True)
            return unusable, gone

    def trim(self) -> None:
        """Deletes the files that were not used for the longest time until the rest fits; called between batches."""
        with self._lock:
            entries = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._folder.iterdir())
            total = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if total <= self._limit:
                    return
                path.unlink()
                self._verified.discard(path.name)
                self._files = {ref: file for ref, file in self._files.items() if file != path}
                total -= size

    def close(self) -> None:
        """Closes the registry."""
        self._versions.close()

    def _find(self, reference: str) -> AdapterVersion:
        name, ref = split_ref(reference if "@" in reference else f"{reference}@{DEFAULT_ALIAS}")
        if not can_exist(name, ref) or ref == LATEST:
            raise SpecError(
                f"invalid adapter {reference[:80]!r}",
                allowed=f"name@version, name@alias, or name for name@{DEFAULT_ALIAS}",
                remedy="name a registered adapter",
            )
        with self._lock:
            version = find_usable(self._versions, f"{name}@{ref}")
            self._versions.require_active(version)
            with self._versions.lineage.database.read() as session:
                revoked = revoked_upstream(session, version)
        if revoked:
            reasons = tuple(f"{subject} was revoked" for subject in revoked)
            raise Refused("it may not be used", reasons=reasons, where=version.ref, remedy="use another version")
        return version

    def _checkout(self, version: AdapterVersion) -> Path:
        file = self._folder / f"{version.sha256}.safetensors"
        if file.name not in self._verified and file.exists() and sha256_file(file) != version.sha256:
            file.unlink()  # damaged since an earlier process wrote it
        if file.exists():
            self.hits += 1
        else:
            self.misses += 1
            self._versions.checkout_adapter(version, file)
        used = time.time_ns()  # the kernel's own clock for files is coarser than the time between two uses
        os.utime(file, ns=(used, used))
        self._verified.add(file.name)
        self._files[version.ref] = file
        return file
