"""Exports a registered adapter, verified, to files of other programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.entities import AdapterVersion
from registry.errors import StoreError
from registry.home import Home
from registry.policy.rights import inherited_license
from registry.versions.versions import Versions
from tasks.content import read_contents
from tasks.errors import SpecError
from tasks.operations.adapter_files import convert_adapter
from tasks.operations.inspect_files import module_shapes_of
from tasks.operations.promote import find_usable
from tasks.operations.results import record_result

_logger = logging.getLogger(__name__)

_CURVES = "training.json"
_FILE = ".safetensors"
_PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class Export:
    """Result of an export.

    Args:
        version: `name@version`.
        sha256: Digest of the registered adapter file.
        format: Name of the format.
        files: `file` and `sha256` of each written file.
        approximation: Shares of the squared norm that are kept; None means that nothing was approximated.
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
    step: int | None = None,
) -> Export:
    """Verifies a version and writes it in a format; logs the export if the home is writable.

    Args:
        home: The home with all state.
        ref: `name@version` or `name@alias`.
        to: Name of a format.
        output: A file that ends in `.safetensors`, or a folder. In a folder the file is `NAME-vN.safetensors`, so
            exports do not overwrite each other, unless the programs of the format expect another name.
        base: The base, for formats that need its module names.
        dtype: `float32`, `float16` or `bfloat16`; None keeps each factor's dtype.
        approximation: `rank` and `energy` for kinds that the format cannot hold; None refuses to approximate.
        step: Training step of a saved adapter; None exports the final one.

    Raises:
        SpecError: The output has the suffix of another kind of file, or no adapter was saved at the step.
        AdapterError: The format cannot hold the adapter.
        Refused: `ref` is an alias whose policy the version does not meet now.
        RegistryError: The version does not exist, or its bytes are damaged.
    """
    _check_output(output)
    versions = Versions(home)
    try:
        version = find_usable(versions, ref)
        with home.temporary_folder(version.size) as folder:
            adapter = folder / "adapter.safetensors"
            name = f"{version.name}-v{version.version}"
            if step is None:
                versions.checkout_adapter(version, adapter)
            else:
                name = f"{name}-step{step}"
                versions.store.checkout_file(version.artifact, _saved_file(versions, version, step), adapter)
            result = convert_adapter(
                adapter,
                output,
                to,
                base=base,
                dtype=dtype,
                approximation=approximation,
                output_name=name,
                license_expression=inherited_license(versions, version.artifact),
            )
        if home.read_only:
            _logger.warning("%s cannot be written, so its log does not have this export of %s", home.path, version.ref)
        else:
            # A revocation lists the exported files, and an import knows them.
            details = {"format": to, "files": result["files"]} | ({"step": step} if step is not None else {})
            versions.log_export(version, details)
            written = [Path(entry["file"]) for entry in result["files"]]
            contents = read_contents(written, output if output.is_dir() else None, module_shapes_of(base))
            source = {version.artifact.sha256: version.artifact}
            record_result(versions, "export", source, written, contents, {"version": version.ref, "format": to})
    finally:
        versions.close()
    return Export(version.ref, version.sha256, to, result["files"], result["approximation"])


def list_saved(versions: Versions, version: AdapterVersion) -> list[dict[str, Any]]:
    """Returns step, file and validation loss of each adapter that was saved during the training of a version.

    Raises:
        StoreError: The artifact is missing or damaged.
    """
    if _CURVES not in versions.store.files(version.artifact):
        return []
    saved: list[dict[str, Any]] = json.loads(versions.store.read(version.artifact, _CURVES)).get("saved", [])
    return saved


def list_readable(versions: Versions, version: AdapterVersion) -> list[dict[str, Any]]:
    """Returns the saved adapters of a version as `list_saved` does; none, with a warning, if they cannot be read."""
    try:
        return list_saved(versions, version) if version.state == "ACTIVE" else []
    except StoreError as error:
        _logger.warning("the saved adapters of %s cannot be read: %s", version.ref, error)
        return []


def _saved_file(versions: Versions, version: AdapterVersion, step: int) -> str:
    saved = {int(entry["step"]): str(entry["file"]) for entry in list_saved(versions, version)}
    if step not in saved:
        raise SpecError(
            f"no adapter of {version.ref} was saved at step {step}",
            where="--step",
            allowed=", ".join(map(str, saved)) or "none; set save_every in the train step",
        )
    return saved[step]


def _check_output(output: Path) -> None:
    if output.suffix.lower() in _PICKLED and not output.is_dir():
        raise SpecError(
            f"{output.name!r} has the suffix of a pickled file, which Loraline never writes",
            where="-o",
            allowed=f"a file that ends in {_FILE}, or a folder",
            remedy=f"use {output.with_suffix(_FILE).name!r}",
        )
    if output.is_dir() and output.suffix == _FILE:
        raise SpecError(
            f"{str(output)!r} is a folder",
            where="-o",
            allowed=f"a file that ends in {_FILE}, or a folder that does not",
        )
    if output.is_file() and output.suffix != _FILE:
        raise SpecError(f"{str(output)!r} is a file", where="-o", allowed=f"a file that ends in {_FILE}, or a folder")
