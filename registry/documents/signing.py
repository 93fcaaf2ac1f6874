"""Signatures: a version's adapter file and its provenance, signed with a key of one's own and verified offline.

What is signed is a folder `name@version` with these two files, by the OpenSSF package model-signing: a manifest of
digests as an in-toto statement, in a DSSE envelope, in a Sigstore bundle. Other programs verify it without this one.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_engine.files import sha256_file
from registry import queries
from registry.context import RegistryContext
from registry.documents.keys import PublicKey, fingerprint, key_of, read_private_key, trusted_keys
from registry.documents.storage import FILES, PROVENANCE, SIGNATURE, find_records, keep, read_document, write_missing
from registry.entities import AdapterVersion, is_digest
from registry.errors import DamagedBlob, MissingBlob, SignatureError
from registry.identity import current_user

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE = "https://model_signing/signature/v1.0"
_FILE = FILES[SIGNATURE][0]
_PROVENANCE = FILES[PROVENANCE][0]
_MAX_BUNDLE = 1 << 20


@dataclass(frozen=True)
class Signature:
    """What a bundle says, before anything of it is believed.

    Args:
        key: Fingerprint of the key that it names.
        subject: Name of the folder that was signed.
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
    """Signs a version, verifies what was signed, and keeps the bundle with it; an earlier signature is replaced.

    Args:
        opened: The registry.
        version: The version; its bytes are verified first.
        key: The private key, a PEM file.
        passphrase: What the key is encrypted with.
        actor: Who signs, for the log; this process's user by default.

    Raises:
        SignatureError: The key cannot be used, or its public key is not trusted in this home.
        StoreError: The bytes are not whole.
    """
    own = fingerprint(read_private_key(key, passphrase).public_key())
    known = trusted_keys(context.home)
    trusted, problem = key_of(known, own), _key_problem(own, known)
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
        who = actor or current_user()
        queries.log_event(session, "sign", actor=who, reason="signed", version=version, details=details)
    return signature


def verify(context: RegistryContext, version: AdapterVersion, keys: Sequence[PublicKey] | None = None) -> PublicKey:
    """The key that a version is validly signed with.

    Args:
        opened: The registry.
        version: The version.
        keys: The keys that are trusted; those of the home by default.

    Raises:
        SignatureError: It is not signed, or the signature does not hold; says why.
    """
    known = trusted_keys(context.home) if keys is None else keys
    findings = signature_findings(context, version, known)
    if findings:
        raise SignatureError("; ".join(findings), where=version.ref, remedy="see `loraline verify`")
    found = key_of(known, _parse(_read_bundle(context, version)).key)
    if found is None:  # cannot be: the findings would have said so
        raise SignatureError("the key is gone", where=version.ref)
    return found


def is_signed(context: RegistryContext, version: AdapterVersion) -> bool:
    """Whether a version has a signature, whatever it is worth."""
    return SIGNATURE in find_records(context.lineage, version)


def signature_findings(
    context: RegistryContext, version: AdapterVersion, keys: Sequence[PublicKey] | None = None
) -> tuple[str, ...]:
    """Why the signature of a version does not hold; empty where it does.

    Args:
        opened: The registry.
        version: The version.
        keys: The keys that are trusted; those of the home by default.
    """
    if not is_signed(context, version):
        return ("it is not signed",)
    try:
        known = trusted_keys(context.home) if keys is None else keys
        bundle = _read_bundle(context, version)
        signature = _parse(bundle)
        problem = _key_problem(signature.key, known)
        if problem:
            return (problem,)
        key = key_of(known, signature.key)
        with _folder(context, version) as folder:
            return tuple(_check(bundle, signature, version, folder, key.path if key else Path()))
    except (SignatureError, MissingBlob, DamagedBlob) as error:
        return (f"{error.where}: {error.problem}" if error.where else error.problem,)


def require_valid_signature(context: RegistryContext, version: AdapterVersion) -> None:
    """Lets a version pass that is validly signed, or not signed at all; what may be had unsigned, policies decide.

    Raises:
        SignatureError: It has a signature that does not hold.
    """
    findings = signature_findings(context, version) if is_signed(context, version) else ()
    if findings:
        raise SignatureError(
            "; ".join(findings), where=version.ref, remedy=f"do not use it before `loraline verify {version.ref}` holds"
        )


def _sign_folder(folder: Path, key: Path, passphrase: bytes | None) -> bytes:
    config = _library(folder.name).signing.Config()
    path = folder.parent / _FILE
    # The package asks for a text, but hands it on to where only bytes are taken.
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
        yield "the signature does not fit what it signs: it was changed, or another key made it"
        return
    except ValueError as error:
        # The signature itself is good: what lies here is not what was signed.
        yield from _differences(signature, folder) or [f"what was signed is not what is here ({error})"]
    else:
        # The package leaves the name of the folder and the choice of files to its callers.
        yield from _differences(signature, folder)
    subject = json.loads((folder / _PROVENANCE).read_bytes())["subject"][0]["digest"]["sha256"]
    if subject != version.sha256:
        yield f"{_PROVENANCE}: it is about an adapter with digest {subject}"
    if signature.subject != version.ref:
        yield f"the signature is of {signature.subject}"


def _differences(signature: Signature, folder: Path) -> list[str]:
    found = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    return [
        f"{name}: signed with digest {signature.digests.get(name, 'none')}, but here it has {found.get(name, 'none')}"
        for name in sorted(found.keys() | signature.digests.keys())
        if signature.digests.get(name) != found.get(name)
    ]


def _key_problem(wanted: str, known: Sequence[PublicKey]) -> str:
    key = key_of(known, wanted)
    if key is None:
        return f"the signing key {wanted[:16]} is not among the {len(known)} trusted public keys of this home"
    if key.has_expired():
        return f"the signing key {key.name!r} ({wanted[:16]}) expired on {key.valid_until}"
    return ""


def _read_bundle(context: RegistryContext, version: AdapterVersion) -> bytes:
    return read_document(context.store, find_records(context.lineage, version), version, _FILE)


def _parse(content: bytes) -> Signature:
    """What a bundle says of itself, checked for its form alone."""
    try:
        found = _read_form(json.loads(content[:_MAX_BUNDLE]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SignatureError(f"the signature cannot be read ({error!r})", remedy="sign again") from None
    if found is None:
        raise SignatureError("the signature is of another form", allowed=f"{BUNDLE}, {PREDICATE}", remedy="sign again")
    return found


def _read_form(bundle: dict[str, Any]) -> Signature | None:
    key, envelope = str(bundle["verificationMaterial"]["publicKey"]["hint"]), bundle["dsseEnvelope"]
    (signed,) = envelope["signatures"]
    base64.b64decode(signed["sig"], validate=True)
    statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
    (subject,), resources = statement["subject"], statement["predicate"]["resources"]
    digests = {str(each["name"]): str(each["digest"]) for each in resources if each["algorithm"] == "sha256"}
    fits = bundle["mediaType"] == BUNDLE and statement["predicateType"] == PREDICATE and is_digest(key)
    if not fits or len(digests) != len(resources) or not all(map(is_digest, digests.values())):
        return None
    return Signature(key, str(subject["name"]), digests)


@contextmanager
def _folder(context: RegistryContext, version: AdapterVersion) -> Iterator[Path]:
    """The folder that is signed, for a while: verified copies of the adapter file and the provenance."""
    store, records = context.store, find_records(context.lineage, version)
    if PROVENANCE not in records:
        raise SignatureError("it has no provenance", where=version.ref, remedy=f"`loraline records {version.ref}`")
    with tempfile.TemporaryDirectory(dir=context.home.work, prefix="signing-") as temporary:
        folder = Path(temporary) / version.ref
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
