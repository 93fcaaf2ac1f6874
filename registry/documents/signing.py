"""Signs a version's adapter file and provenance with the user's own key, and verifies signatures offline.

The OpenSSF package model-signing signs a folder `name@version` with these two files. The signature is a manifest of
digests as an in-toto statement, in a DSSE envelope, in a Sigstore bundle. Other programs can verify the bundle.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_engine.files import sha256_file
from registry import queries
from registry.context import RegistryContext
from registry.documents.keys import PublicKey, fingerprint, key_of, read_private_key, trusted_keys
from registry.documents.storage import (
    DOCUMENT_FILES,
    PROVENANCE,
    SIGNATURE,
    find_records,
    keep,
    read_version_document,
    write_missing,
)
from registry.entities import AdapterVersion, is_digest
from registry.errors import DamagedBlob, MissingBlob, SignatureError
from registry.identity import current_user

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PREDICATE = "https://model_signing/signature/v1.0"
_FILE = DOCUMENT_FILES[SIGNATURE][0]
_PROVENANCE = DOCUMENT_FILES[PROVENANCE][0]
_MAX_BUNDLE = 1 << 20


@dataclass(frozen=True)
class Signature:
    """The claims of a bundle, not verified.

    Args:
        key: Fingerprint of the signing key.
        subject: Name of the signed folder.
        digests: File of the folder -> SHA-256.
    """

    key: str
    subject: str
    digests: Mapping[str, str]


def sign(
    context: RegistryContext,
    version: AdapterVersion,
    key: Path,
    passphrase: bytes | None = None,
    *,
    actor: str | None = None,
) -> Signature:
    """Signs a version, verifies the signature and stores the bundle; replaces an earlier signature.

    Args:
        context: The registry.
        version: The version; its bytes are verified first.
        key: PEM file of the private key.
        passphrase: Passphrase of the key; None means unencrypted.
        actor: User for the log; None means the current user.

    Raises:
        SignatureError: The key cannot be used, or its public key is not trusted in this home.
        StoreError: The bytes are damaged.
    """
    own = fingerprint(read_private_key(key, passphrase).public_key())
    keys = trusted_keys(context.home)
    trusted, problem = key_of(keys, own), _key_problem(own, keys)
    if trusted is None or problem:
        raise SignatureError(problem, where=str(key), remedy="`loraline keys trust FILE.pub`, then sign again")
    write_missing(context, version)
    with _folder(context, version) as folder:
        content = _sign_folder(folder, key, passphrase)
        signature = _parse(content)
        findings = list(_check(content, signature, version, folder, trusted.path))
    if findings:
        raise SignatureError("; ".join(findings), where=version.ref, remedy="run `loraline fsck`, then sign again")
    ref = context.store.put_files(SIGNATURE, {_FILE: content})
    details = {"key": own, "bundle": ref.sha256, "digests": dict(signature.digests)}
    with context.lineage.database.write() as session:
        keep(session, context.store, version, SIGNATURE, ref)
        actor = actor or current_user()
        queries.log_event(session, "sign", actor=actor, reason="signed", version=version, details=details)
    return signature


def verify(context: RegistryContext, version: AdapterVersion, keys: Sequence[PublicKey] | None = None) -> PublicKey:
    """Verifies the signature of a version, and returns its key.

    Args:
        context: The registry.
        version: The version.
        keys: Trusted keys; None means those of the home.

    Raises:
        SignatureError: The version is not signed, or the signature is invalid.
    """
    trusted = trusted_keys(context.home) if keys is None else keys
    findings = signature_findings(context, version, trusted)
    if findings:
        raise SignatureError("; ".join(findings), where=version.ref, remedy="see `loraline verify`")
    key = key_of(trusted, _parse(_read_bundle(context, version)).key)
    if key is None:  # unreachable: the findings would report it
        raise SignatureError("the key is missing", where=version.ref)
    return key


def is_signed(context: RegistryContext, version: AdapterVersion) -> bool:
    """Returns True if a version has a signature, valid or not."""
    return SIGNATURE in find_records(context.lineage, version)


def signature_findings(
    context: RegistryContext, version: AdapterVersion, keys: Sequence[PublicKey] | None = None
) -> tuple[str, ...]:
    """Returns the problems of a version's signature; empty if it is valid.

    Args:
        context: The registry.
        version: The version.
        keys: Trusted keys; None means those of the home.
    """
    if not is_signed(context, version):
        return ("it is not signed",)
    try:
        trusted = trusted_keys(context.home) if keys is None else keys
        bundle = _read_bundle(context, version)
        signature = _parse(bundle)
        problem = _key_problem(signature.key, trusted)
        if problem:
            return (problem,)
        key = key_of(trusted, signature.key)
        with _folder(context, version) as folder:
            return tuple(_check(bundle, signature, version, folder, key.path if key else Path()))
    except (SignatureError, MissingBlob, DamagedBlob) as error:
        return (f"{error.where}: {error.problem}" if error.where else error.problem,)


def require_valid_signature(context: RegistryContext, version: AdapterVersion) -> None:
    """Raises SignatureError if a version has an invalid signature; policies decide about unsigned versions.

    Raises:
        SignatureError: The signature is invalid.
    """
    findings = signature_findings(context, version) if is_signed(context, version) else ()
    if findings:
        raise SignatureError(
            "; ".join(findings), where=version.ref, remedy=f"do not use it before `loraline verify {version.ref}` holds"
        )


def _sign_folder(folder: Path, key: Path, passphrase: bytes | None) -> bytes:
    config = _library(folder.name).signing.Config()
    path = folder.parent / _FILE
    # The package declares a string here, but passes it to an API that accepts only bytes.
    config.use_elliptic_key_signer(private_key=key, password=passphrase or None).sign(folder, path)
    return path.read_bytes()


def _check(bundle: bytes, signature: Signature, version: AdapterVersion, folder: Path, key: Path) -> Iterator[str]:
    from cryptography.exceptions import InvalidSignature

    library = _library(version.ref)
    path = folder.parent / _FILE
    path.write_bytes(bundle)
    try:
        library.verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, path)
    except InvalidSignature:
        yield "the signature does not match the signed content: it was changed, or another key made it"
        return
    except ValueError as error:
        # The signature is valid, but the files differ from the signed ones.
        yield from _differences(signature, folder) or [f"the files differ from the signed ones ({error})"]
    else:
        # The package does not check the folder's name and the set of files.
        yield from _differences(signature, folder)
    subject = json.loads((folder / _PROVENANCE).read_bytes())["subject"][0]["digest"]["sha256"]
    if subject != version.sha256:
        yield f"{_PROVENANCE}: describes an adapter with digest {subject}"
    if signature.subject != version.ref:
        yield f"the signature is of {signature.subject}"


def _differences(signature: Signature, folder: Path) -> list[str]:
    actual = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    return [
        f"{name}: signed with digest {signature.digests.get(name, 'none')}, but now has {actual.get(name, 'none')}"
        for name in sorted(actual.keys() | signature.digests.keys())
        if signature.digests.get(name) != actual.get(name)
    ]


def _key_problem(fingerprint: str, trusted: Sequence[PublicKey]) -> str:
    key = key_of(trusted, fingerprint)
    if key is None:
        return f"the signing key {fingerprint[:16]} is not among the {len(trusted)} trusted public keys of this home"
    if key.has_expired():
        return f"the signing key {key.name!r} ({fingerprint[:16]}) expired on {key.valid_until}"
    return ""


def _read_bundle(context: RegistryContext, version: AdapterVersion) -> bytes:
    return read_version_document(context.store, find_records(context.lineage, version), version, _FILE)


def _parse(content: bytes) -> Signature:
    """Returns the claims of a bundle; checks only its form."""
    try:
        signature = _read_form(json.loads(content[:_MAX_BUNDLE]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SignatureError(f"the signature cannot be read ({error!r})", remedy="sign again") from None
    if signature is None:
        raise SignatureError(
            "the signature has an unknown form", allowed=f"{_BUNDLE}, {_PREDICATE}", remedy="sign again"
        )
    return signature


def _read_form(bundle: dict[str, Any]) -> Signature | None:
    key, envelope = str(bundle["verificationMaterial"]["publicKey"]["hint"]), bundle["dsseEnvelope"]
    (signed,) = envelope["signatures"]
    base64.b64decode(signed["sig"], validate=True)
    statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
    (subject,), resources = statement["subject"], statement["predicate"]["resources"]
    digests = {str(entry["name"]): str(entry["digest"]) for entry in resources if entry["algorithm"] == "sha256"}
    is_known = bundle["mediaType"] == _BUNDLE and statement["predicateType"] == _PREDICATE and is_digest(key)
    if not is_known or len(digests) != len(resources) or not all(map(is_digest, digests.values())):
        return None
    return Signature(key, str(subject["name"]), digests)


@contextmanager
def _folder(context: RegistryContext, version: AdapterVersion) -> Iterator[Path]:
    """Yields a temporary folder to sign, with verified copies of the adapter file and the provenance."""
    store, records = context.store, find_records(context.lineage, version)
    if PROVENANCE not in records:
        raise SignatureError("it has no provenance", where=version.ref, remedy=f"`loraline records {version.ref}`")
    with context.home.temporary_folder(version.size) as temporary:
        folder = temporary / version.ref
        adapter = PurePosixPath(version.adapter_path).name
        store.checkout_file(version.artifact, version.adapter_path, folder / adapter)
        store.checkout_file(records[PROVENANCE], _PROVENANCE, folder / _PROVENANCE)
        yield folder


def _library(where: str) -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise SignatureError(
            f"signatures need the package model-signing ({error})", where=where, remedy="pip install 'loraline[sign]'"
        ) from None
    return model_signing
