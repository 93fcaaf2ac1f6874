"""Writes, signs and verifies the documents of a version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_engine.errors import AdapterError
from lora_engine.files import atomic_write, sha256_bytes
from registry.documents.bundle import Signature
from registry.documents.signing import is_signed, sign, signature_findings, signers, uncovered
from registry.documents.storage import (
    CARD,
    DOCUMENT_FILES,
    SIGNATURE,
    document_problems,
    find_records,
    read_documents,
    read_version_document,
)
from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import StoreError, VersionError
from registry.home import Home
from registry.policy.conditions import judge_alias
from registry.refs import split_ref
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.operations.promote import find_usable, find_version


@dataclass(frozen=True)
class Verification:
    """Findings of a verification, by check; a check without findings passed.

    Args:
        version: `name@version`.
        sha256: Registered digest of the adapter file.
        bytes: Findings on the bytes of the adapter and its report.
        structure: Findings on the structure of the adapter file.
        records: Findings on its documents: missing, damaged, or for another adapter.
        signature: Findings on its signature; empty if it is unsigned and need not be signed.
        signed_by: Name of the trusted key of its first valid signature; None means no valid signature.
        is_signed: True if it has a signature.
        signers: Names of the trusted keys of all its signatures, if they are valid.
        unsigned: Documents that no signature covers, if it is signed.
        policy: Alias -> reasons for which the version does not meet its policy now.
    """

    version: str
    sha256: str
    bytes: tuple[str, ...]
    structure: tuple[str, ...]
    records: tuple[str, ...]
    signature: tuple[str, ...]
    signed_by: str | None
    is_signed: bool
    signers: tuple[str, ...] = ()
    unsigned: tuple[str, ...] = ()
    policy: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Returns True if there are no findings."""
        return not (self.bytes or self.structure or self.records or self.signature or any(self.policy.values()))


def read_model_card(home: Home, ref: str, *, html: bool) -> bytes:
    """Returns the model card of a version, as Markdown or as one HTML page.

    Raises:
        RegistryError: The version does not exist, or its card is gone.
    """
    versions = Versions(home)
    return read_documents(versions, find_version(versions, ref))[DOCUMENT_FILES[CARD][1 if html else 0]]


def write_card(home: Home, ref: str, path: Path) -> None:
    """Writes the model card of a version.

    Raises:
        SpecError: The file ends in neither `.md` nor `.html`.
        RegistryError: See `read_card`.
    """
    if path.suffix not in {".md", ".html"}:
        raise SpecError(f"unknown kind of card {path.name!r}", where="-o", allowed="a file ending in .md or .html")
    atomic_write(path, read_model_card(home, ref, html=path.suffix == ".html"))


def write_documents(home: Home, ref: str, folder: Path, *, with_adapter: bool = False) -> list[dict[str, str]]:
    """Writes all documents of a version, verified, into a folder.

    Args:
        home: The home with all state.
        ref: `name@version` or `name@alias`.
        folder: The output folder; replaces files of the same names.
        with_adapter: True also writes the registered adapter file, which the signature covers.

    Returns:
        `file` and `sha256` of each written file.
    """
    versions = Versions(home)
    version = find_usable(versions, ref) if with_adapter else find_version(versions, ref)
    contents = read_documents(versions, version)
    if with_adapter:
        contents[PurePosixPath(version.adapter_path).name] = versions.read_adapter(version)
    for file, content in contents.items():
        atomic_write(folder / file, content)
    return [{"file": str(folder / file), "sha256": sha256_bytes(content)} for file, content in contents.items()]


def records_beside(output: Path) -> Path:
    """Returns the folder for the documents beside an exported file or in an exported folder."""
    return output.with_name(f"{output.stem}-records") if output.suffix else output / "records"


def sign_version(home: Home, ref: str, key: Path, passphrase: bytes | None) -> tuple[AdapterVersion, Signature]:
    """Signs a version with a private key whose public key the home trusts.

    Raises:
        SignatureError: The key cannot be used.
        RegistryError: The version does not exist, or its bytes are damaged.
    """
    versions = Versions(home)
    version = find_version(versions, ref)
    signature = sign(versions, version, key, passphrase)
    versions.sync()
    return version, signature


def verify_version(home: Home, ref: str, *, must_be_signed: bool = False) -> Verification:
    """Verifies a version: bytes, structure, documents, signature.

    Args:
        home: The home with all state.
        ref: `name@version` or `name@alias`.
        must_be_signed: True makes a missing signature a finding.
    """
    versions = Versions(home)
    version = find_version(versions, ref)
    damage = versions.damage(version)
    signed = is_signed(versions, version)
    findings = signature_findings(versions, version) if signed or must_be_signed else ()
    names = tuple(key.name for key in signers(versions, version)) if signed and not findings else ()
    return Verification(
        version=version.ref,
        sha256=version.sha256,
        bytes=damage,
        structure=() if damage else tuple(_structure(versions, version)),
        records=tuple(_records(versions, version)),
        signature=findings,
        signed_by=names[0] if names else None,
        is_signed=signed,
        signers=names,
        unsigned=uncovered(versions, version) if names else (),
        policy={alias: judge_alias(versions, version, alias).reasons for alias in _judged(version, ref)},
    )


def _judged(version: AdapterVersion, ref: str) -> tuple[str, ...]:
    """Returns the alias that a reference names, or all aliases of the version."""
    alias = split_ref(ref)[1]
    return (alias,) if alias in version.aliases else version.aliases


def _structure(versions: Versions, version: AdapterVersion) -> Iterator[str]:
    from lora_engine.formats import read_bundle

    with versions.home.temporary_folder(version.size) as folder:
        path = folder / PurePosixPath(version.adapter_path).name
        versions.store.checkout_file(version.artifact, version.adapter_path, path)
        try:
            read_bundle(path)
        except AdapterError as error:
            yield error.problem


def _records(versions: Versions, version: AdapterVersion) -> Iterator[str]:
    records = find_records(versions.lineage, version)
    for kind in DOCUMENT_FILES.keys() - records.keys() - {SIGNATURE}:
        yield f"{kind}: it was never written"
    for kind in records:
        for file in DOCUMENT_FILES.get(kind, ()):
            yield from (f"{file}: {problem}" for problem in _document_problems(versions, records, version, file))


def _document_problems(
    versions: Versions, records: Mapping[str, ArtifactRef], version: AdapterVersion, file: str
) -> Iterator[str]:
    """Yields problems of a document: damaged, or for another adapter than the registered one."""
    try:
        content = read_version_document(versions.store, records, version, file)
    except (StoreError, VersionError) as error:
        yield error.problem
        return
    yield from document_problems(file, content, version.sha256)
