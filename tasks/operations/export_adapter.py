"""`export_version`: a registered adapter, verified, as files that other programs read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.home import Home
from registry.identity import current_user
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.operations.adapter_files import convert_adapter
from tasks.operations.promote import find_version

_FILE = ".safetensors"
_PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class Export:
    """What was written.

    Args:
        version: `name@version` of what was exported.
        sha256: Digest of the registered adapter file that it was made from.
        format: Name of the format.
        files: `file` and `sha256` of each file that was written.
        approximation: What share was kept, where something had to be approximated.
    """

    version: str
    sha256: str
    format: str
    files: list[dict[str, str]]
    approximation: Mapping[str, Any] | None


def export_version(
    home: Home,
    ref: str,
    to: str,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    approximation: Mapping[str, Any] | None = None,
) -> Export:
    """Writes a version in a format; every byte that it is made from was just verified.

    Args:
        home: Where all state lives.
        ref: `name@version` or `name@alias`.
        to: Name of a format.
        output: A file that ends in `.safetensors`, or a folder, which gets the format's usual file names.
        base: Where the format's names need one.
        dtype: `float32`, `float16` or `bfloat16`; None keeps each factor's.
        approximation: `rank` and `energy` of what the format cannot hold as it is; None refuses to approximate.

    Raises:
        SpecError: The output is named like a file of another kind.
        AdapterError: The format cannot hold the adapter.
        RegistryError: No such version, or its bytes are not whole.
    """
    _check_output(output)
    versions = Versions(home)
    try:
        version = find_version(versions, ref)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "adapter.safetensors"
            versions.checkout_adapter(version, source)
            done = convert_adapter(source, output, to, base=base, dtype=dtype, approximation=approximation)
        # Where it went, for a recall.
        versions.log_export(version, {"format": to, "files": done["files"]}, actor=current_user())
    finally:
        versions.close()
    return Export(version.ref, version.sha256, to, done["files"], done["approximation"])


def _check_output(output: Path) -> None:
    if output.suffix.lower() in _PICKLED and not output.is_dir():
        raise SpecError(
            f"{output.name!r} is the name of a pickled file, and none is ever written",
            where="-o",
            allowed=f"a file that ends in {_FILE}, or a folder",
            remedy=f"name it {output.with_suffix(_FILE).name!r}",
        )
    if output.is_dir() and output.suffix == _FILE:
        raise SpecError(
            f"{str(output)!r} is a folder", where="-o", allowed=f"a file that ends in {_FILE}, or a folder without"
        )
    if output.is_file() and output.suffix != _FILE:
        raise SpecError(f"{str(output)!r} is a file", where="-o", allowed=f"a file that ends in {_FILE}, or a folder")
