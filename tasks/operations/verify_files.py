"""Verifies an exported folder or file by its signatures, with public keys alone: needs no home."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_engine.documents import parse_json
from lora_engine.errors import AdapterError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes, sha256_file
from registry.documents.bundle import (
    Signature,
    check_files,
    head_file,
    is_signature,
    key_problem,
    parse_bundle,
    read_signed_file,
)
from registry.documents.keys import PublicKey, key_of, read_public_key
from registry.documents.storage import DOCUMENT_FILES, PROVENANCE, document_problems
from registry.errors import SignatureError
from tasks.errors import SpecError

EXPORTED = "exported.json"
"""File beside the documents that names the exported files with their digests. No signature covers it."""
_PROVENANCE = DOCUMENT_FILES[PROVENANCE][0]
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "urn:loraline:export:v1"
_MAX_STATEMENT = 1 << 20


@dataclass(frozen=True)
class FileVerification:
    """Findings of a verification without a home.

    Args:
        folder: Folder with the signatures and the signed files.
        version: `name@version` that the signatures are of; empty if none is valid.
        signed: File -> digest that a valid signature covers.
        signed_by: Names of the given keys with a valid signature.
        exported: File -> digest that the unsigned statement of the export has.
        findings: All problems; empty if everything holds.
        notes: What the signatures do not show.
    """

    folder: Path
    version: str
    signed: dict[str, str]
    signed_by: tuple[str, ...]
    exported: dict[str, str]
    findings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Returns True if there are no findings."""
        return not self.findings


def write_export_statement(folder: Path, version: str, sha256: str, files: Sequence[str]) -> dict[str, str]:
    """Writes the digests of exported files beside the documents of their version; returns `file` and `sha256` of it.

    Args:
        folder: Folder of the documents.
        version: `name@version`.
        sha256: Digest of the registered adapter file.
        files: The exported files.
    """
    subjects = [
        {"name": Path(os.path.relpath(file, folder.parent)).as_posix(), "digest": {"sha256": sha256_file(Path(file))}}
        for file in files
    ]
    predicate = {"version": version, "adapter": {"sha256": sha256}}
    statement = {"_type": _STATEMENT, "subject": subjects, "predicateType": _PREDICATE, "predicate": predicate}
    content = canonical_json(statement)
    atomic_write(folder / EXPORTED, content)
    return {"file": str(folder / EXPORTED), "sha256": sha256_bytes(content)}


def verify_files(path: Path, keys: Sequence[Path]) -> FileVerification:
    """Verifies a folder that `records` or `export --with-records` wrote, or one file of it.

    Args:
        path: The folder, the folder around it, or an adapter file or document with the signatures beside it.
        keys: Files of the public keys; each must have a valid signature.

    Raises:
        SpecError: There is nothing at the path, or no signature beside it.
        SignatureError: A key cannot be read.
    """
    trusted = [read_public_key(key) for key in keys]
    folder = _find_folder(path)
    files = sorted(entry.name for entry in folder.iterdir() if entry.is_file() or entry.is_symlink())
    valid: list[tuple[PublicKey, Signature]] = []
    findings: list[str] = []
    notes: list[str] = []
    for file in filter(is_signature, files):
        _check_signature(folder, file, trusted, valid, findings, notes)
    signers = {key.fingerprint for key, _ in valid}
    findings += [f"no valid signature of the key {key.name!r}" for key in trusted if key.fingerprint not in signers]
    signed = {name: digest for _, signature in valid for name, digest in signature.digests.items()}
    findings += _check_contents(folder, files, valid, signed)
    version = valid[0][1].subject if valid else ""
    exported = _read_statement(folder, version, signed, findings)
    findings += _check_exported(path, folder, signed, exported)
    if exported:
        notes.append(f"{EXPORTED} has the digests of the exported files; no signature covers these")
    names = tuple(key.name for key in trusted if key.fingerprint in signers)
    return FileVerification(folder, version, signed, names, exported, tuple(findings), tuple(notes))


def _find_folder(path: Path) -> Path:
    if not path.exists():
        raise SpecError("there is no such file or folder", where=str(path), allowed="a file or folder, with --key")
    beside = [path, path / "records"] if path.is_dir() else []
    beside += [] if path.is_dir() else [path.parent, path.with_name(f"{path.stem}-records"), path.parent / "records"]
    for folder in beside:
        if folder.is_dir() and any(is_signature(entry.name) for entry in folder.iterdir()):
            return folder
    raise SpecError(
        "there is no signature beside it",
        where=str(path),
        allowed="what `loraline records --with-adapter` or `export --with-records` wrote of a signed version",
    )


def _check_signature(
    folder: Path,
    file: str,
    trusted: Sequence[PublicKey],
    valid: list[tuple[PublicKey, Signature]],
    findings: list[str],
    notes: list[str],
) -> None:
    try:
        signature = parse_bundle(read_signed_file(folder / file))
        key, problem = key_of(trusted, signature.key), key_problem(signature.key, trusted, "given keys")
        if key is None:
            notes.append(f"{file}: {problem}")
            return
        problems = [problem] if problem else list(check_files(folder / file, folder, key.path, (_PROVENANCE,)))
    except SignatureError as error:
        problems = [error.problem]
    else:
        if not problems:
            valid.append((key, signature))
    findings += [f"{file}: {entry}" for entry in problems]


def _check_contents(
    folder: Path, files: Sequence[str], valid: Sequence[tuple[PublicKey, Signature]], signed: dict[str, str]
) -> Iterator[str]:
    """Yields files that no signature covers, and documents and adapters that do not fit together."""
    if not valid:
        return
    for subject in sorted({signature.subject for _, signature in valid} - {valid[0][1].subject}):
        yield f"the signatures are of {valid[0][1].subject} and {subject}"
    # A signature of another key is named in a note, and with it the head that only it covers.
    signatures = set(filter(is_signature, files))
    for file in sorted(set(files) - signed.keys() - signatures - set(map(head_file, signatures))):
        if file != EXPORTED:
            yield f"{file}: no valid signature covers it"
    provenance: Any = json.loads((folder / _PROVENANCE).read_bytes())
    subject = provenance["subject"][0]
    name, sha256 = PurePosixPath(str(subject["name"])).name, str(subject["digest"]["sha256"])
    adapters = [file for file, digest in signed.items() if digest == sha256]
    if not adapters:
        yield f"{_PROVENANCE}: describes {name} with digest {sha256}, which no valid signature covers"
    for file in adapters:
        yield from (f"{file}: {problem}" for problem in _check_structure(folder / file))
    for file in signed:
        yield from (f"{file}: {entry}" for entry in document_problems(file, (folder / file).read_bytes(), sha256))


def _check_structure(path: Path) -> Iterator[str]:
    from lora_engine.formats import read_bundle

    try:
        read_bundle(path)
    except AdapterError as error:
        yield error.problem


def _read_statement(folder: Path, version: str, signed: dict[str, str], findings: list[str]) -> dict[str, str]:
    """Returns the exported files with their digests; adds a finding if the statement is not of the signed version."""
    path = folder / EXPORTED
    if not path.is_file():
        return {}
    try:
        content = path.read_bytes()[:_MAX_STATEMENT]
        statement = parse_json(content, EXPORTED, SpecError)
        subjects = {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in statement["subject"]}
        is_known = (statement["_type"], statement["predicateType"]) == (_STATEMENT, _PREDICATE)
        sha256 = statement["predicate"]["adapter"]["sha256"]
        is_of_version = statement["predicate"] == {"version": version, "adapter": {"sha256": sha256}}
    except (SpecError, KeyError, TypeError):
        findings.append(f"{EXPORTED}: it cannot be read")
        return {}
    if not is_known or canonical_json(statement) != content or not all(map(_is_inside, subjects)):
        findings.append(f"{EXPORTED}: it has an unknown form")
        return {}
    if signed and not (is_of_version and sha256 in signed.values()):
        findings.append(f"{EXPORTED}: it is not of {version} as it was signed")
    return subjects


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _check_exported(path: Path, folder: Path, signed: dict[str, str], exported: dict[str, str]) -> Iterator[str]:
    """Yields exported files that changed, and the given file if neither a signature nor the export has it."""
    for name, digest in exported.items():
        file = folder.parent / name
        if file.is_file() and (actual := sha256_file(file)) != digest:
            yield f"{name}: {EXPORTED} has digest {digest}, but the file has {actual}"
        elif not file.is_file() and path == folder.parent:
            yield f"{name}: {EXPORTED} has digest {digest}, but the file is missing"
    if path.is_file():
        known = path.parent == folder and (path.name in signed or is_signature(path.name) or path.name == EXPORTED)
        if not known and Path(os.path.relpath(path, folder.parent)).as_posix() not in exported:
            yield f"{path.name}: neither a valid signature nor the statement of the export has it"
