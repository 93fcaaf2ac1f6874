"""Finds the adapters that requests name, and keeps their files while they are used."""

from __future__ import annotations

import threading
from pathlib import Path

from registry.home import Home
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.operations.promote import find_usable


class ServedAdapters:
    """The adapters of a registry as files, by digest.

    Args:
        home: The home with the versions.
        folder: The folder for their files.
    """

    def __init__(self, home: Home, folder: Path) -> None:
        self._versions, self._folder = Versions(home), folder
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, reference: str) -> tuple[Path, str]:
        """Returns the file and the `name@version` of an adapter that may be used now.

        Args:
            reference: `name@version` or `name@alias`; `name` alone means `name@production`.

        Raises:
            SpecError: The reference names a file; requests name registered adapters only.
            RegistryError: No such version, or it may not be used, for instance because it is withdrawn.
        """
        if "/" in reference or "\\" in reference:
            raise SpecError(f"invalid adapter {reference!r}", allowed="name@version, name@alias or name")
        with self._lock:
            version = find_usable(self._versions, reference if "@" in reference else f"{reference}@production")
            file = self._folder / f"{version.artifact.sha256}.safetensors"
            if not file.exists():
                self._versions.checkout_adapter(version, file)
        return file, f"{version.name}@{version.version}"

    def close(self) -> None:
        """Closes the registry."""
        self._versions.close()
