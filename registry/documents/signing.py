"""Signs a version whole with the user's own key, and verifies its signatures offline.

Each signature covers a folder `name@version` with the adapter file, the model card, the provenance, the bill of
materials and the head of the event log. Each key has one signature, in a file of its own; all are one artifact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lora_engine.files import canonical_json
from registry import event_log
from registry.context import RegistryContext
from registry.documents.bundle import (
    FIRST_FILE,
    Signature,
    check_files,
    file_of,
    head_file,
    is_head,
    is_signature,
    key_problem,
    parse_bundle,
    signing_library,
)
from registry.documents.keys import PublicKey, fingerprint, key_of, read_private_key, trusted_keys
from registry.documents.storage import (
    DOCUMENT_FILES,
    PROVENANCE,
    SIGNATURE,
    find_records,
    keep,
    write_missing,
)
from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import DamagedBlob, MissingBlob, RegistryError, SignatureError
from registry.policy.actors import establish_actor
from registry.store.chain import Head, read_head
from registry.store.tables import EventRow

_PROVENANCE = DOCUMENT_FILES[PROVENANCE][0]
_DOCUMENTS = tuple(file for kind, files in DOCUMENT_FILES.items() if kind != SIGNATURE for file in files)


def sign(
    context: RegistryContext,
    version: AdapterVersion,
    key: Path,
    passphrase: bytes | None = None,
    *,
    actor: str | None = None,
) -> Signature:
    """Signs a version, verifies the signature and stores it; replaces an earlier signature of the same key.

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
    trusted, problem = key_of(keys, own), key_problem(own, keys)
    if trusted is None or problem:
        raise SignatureError(problem, where=str(key), remedy="`loraline keys trust FILE.pub`, then sign again")
    write_missing(context, version)
    files = _readable_signatures(context, version)
    file = next((name for name, signature in _parsed(files).items() if signature.key == own), None)
    file = file or (FIRST_FILE if FIRST_FILE not in files else file_of(own))
    with context.lineage.database.read() as session:
        head = read_head(session, EventRow.__table__)
    if head:
        files[head_file(file)] = canonical_json({"seq": head.seq, "digest": head.digest})
    with _folder(context, version, {name: files[name] for name in [head_file(file)] if name in files}) as folder:
        files[file] = _sign_folder(folder, key, passphrase)
        signature = parse_bundle(files[file])
        (folder.parent / file).write_bytes(files[file])
        findings = [*_check(folder.parent / file, version, folder, trusted.path)]
    if findings:
        raise SignatureError("; ".join(findings), where=version.ref, remedy="run `loraline fsck`, then sign again")
    ref = context.store.put_files(SIGNATURE, dict(files))
    details = {"key": own, "bundle": ref.sha256, "file": file, "digests": dict(signature.digests)}
    with context.lineage.database.write() as session:
        keep(session, context.store, version, SIGNATURE, ref)
        actor = establish_actor(context, actor)
        event_log.log_event(session, "sign", actor=actor, reason="signed", version=version, details=details)
    return signature


def signers(
    context: RegistryContext, version: AdapterVersion, keys: Sequence[PublicKey] | None = None
) -> tuple[PublicKey, ...]:
    """Returns the trusted keys that the signatures of a version name, the first signature's first; verifies nothing."""
    trusted = trusted_keys(context.home) if keys is None else keys
    named = _parsed(_read_signatures(context, version)).values()
    return tuple(key for signature in named if (key := key_of(trusted, signature.key)) and not key.has_expired())


def is_signed(context: RegistryContext, version: AdapterVersion) -> bool:
    """Returns True if a version has a signature, valid or not."""
    return SIGNATURE in find_records(context.lineage, version)


def signature_findings(
    context: RegistryContext, version: AdapterVersion, keys: Sequence[PublicKey] | None = None
) -> tuple[str, ...]:
    """Returns the problems of a version's signatures; empty if all are valid and one is of a trusted key.

    A signature of a key that is not trusted, or has expired, is no problem beside a valid one.

    Args:
        context: The registry.
        version: The version.
        keys: Trusted keys; None means those of the home.
    """
    if not is_signed(context, version):
        return ("it is not signed",)
    try:
        trusted = trusted_keys(context.home) if keys is None else keys
        files = _read_signatures(context, version)
        with _folder(context, version, files) as folder:
            return tuple(_find_problems(version, folder, files, trusted))
    except (SignatureError, MissingBlob, DamagedBlob) as error:
        return (f"{error.where}: {error.problem}" if error.where else error.problem,)


def uncovered(context: RegistryContext, version: AdapterVersion) -> tuple[str, ...]:
    """Returns the documents that no signature of a version covers; releases before 0.4 signed the provenance only."""
    covered = {name for signature in _parsed(_read_signatures(context, version)).values() for name in signature.digests}
    return tuple(sorted(set(_DOCUMENTS) - covered))


def signed_heads(context: RegistryContext, version: AdapterVersion) -> list[Head]:
    """Returns the heads of the event log that the signatures of a version cover; verifies no signature."""
    heads = [json.loads(content) for file, content in _read_signatures(context, version).items() if is_head(file)]
    return [Head(int(head["seq"]), str(head["digest"])) for head in heads]


def require_valid_signature(context: RegistryContext, version: AdapterVersion) -> None:
    """Raises SignatureError if a version has an invalid signature; policies decide about unsigned versions.

    Raises:
        SignatureError: A signature is invalid.
    """
    findings = signature_findings(context, version) if is_signed(context, version) else ()
    if findings:
        raise SignatureError(
            "; ".join(findings), where=version.ref, remedy=f"do not use it before `loraline verify {version.ref}` holds"
        )


def _find_problems(
    version: AdapterVersion, folder: Path, files: Mapping[str, bytes], trusted: Sequence[PublicKey]
) -> Iterator[str]:
    untrusted, is_valid, is_alone = [], False, sum(map(is_signature, files)) == 1
    for file in filter(is_signature, files):
        prefix = "" if is_alone else f"{file}: "
        try:
            signature = parse_bundle(files[file])
        except SignatureError as error:
            yield f"{prefix}{error.problem}"
            continue
        problem, key = key_problem(signature.key, trusted), key_of(trusted, signature.key)
        if problem or key is None:
            untrusted.append(f"{prefix}{problem}")
            continue
        findings = list(_check(folder / file, version, folder, key.path))
        yield from (f"{prefix}{finding}" for finding in findings)
        is_valid = is_valid or not findings
    if not is_valid:
        yield from untrusted


def _sign_folder(folder: Path, key: Path, passphrase: bytes | None) -> bytes:
    config = signing_library(folder.name).signing.Config()
    path = folder.parent / FIRST_FILE
    # The package declares a string here, but passes it to an API that accepts only bytes.
    config.use_elliptic_key_signer(private_key=key, password=passphrase or None).sign(folder, path)
    return path.read_bytes()


def _check(bundle: Path, version: AdapterVersion, folder: Path, key: Path) -> Iterator[str]:
    # Signatures of earlier releases cover these two files only; see `uncovered`.
    names = (PurePosixPath(version.adapter_path).name, _PROVENANCE)
    findings = list(check_files(bundle, folder, key, names))
    yield from findings
    if any("was changed" in finding for finding in findings):
        return
    subject = json.loads((folder / _PROVENANCE).read_bytes())["subject"][0]["digest"]["sha256"]
    if subject != version.sha256:
        yield f"{_PROVENANCE}: describes an adapter with digest {subject}"
    signature = parse_bundle(bundle.read_bytes())
    if signature.subject != version.ref:
        yield f"the signature is of {signature.subject}"


def _read_signatures(context: RegistryContext, version: AdapterVersion) -> dict[str, bytes]:
    """Returns the files of all signatures of a version, verified, the first signature's first."""
    ref = find_records(context.lineage, version).get(SIGNATURE)
    return _read_all(context, ref) if ref else {}


def _readable_signatures(context: RegistryContext, version: AdapterVersion) -> dict[str, bytes]:
    """Returns the files of the signatures that can be read: signing again replaces damaged ones."""
    try:
        return _read_signatures(context, version)
    except RegistryError:
        return {}


def _read_all(context: RegistryContext, ref: ArtifactRef) -> dict[str, bytes]:
    files = [file for file in context.store.files(ref) if is_signature(file) or is_head(file)]
    return {file: context.store.read(ref, file) for file in sorted(files, key=lambda file: (file != FIRST_FILE, file))}


def _parsed(files: Mapping[str, bytes]) -> dict[str, Signature]:
    """Returns the claims of the signatures that can be read, by file."""
    signatures = {}
    for file in filter(is_signature, files):
        try:
            signatures[file] = parse_bundle(files[file])
        except SignatureError:
            continue
    return signatures


@contextmanager
def _folder(context: RegistryContext, version: AdapterVersion, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Yields a temporary folder to sign, with verified copies of the adapter file and the documents, and with files."""
    store, records = context.store, find_records(context.lineage, version)
    if PROVENANCE not in records:
        raise SignatureError("it has no provenance", where=version.ref, remedy=f"`loraline records {version.ref}`")
    with context.home.temporary_folder(version.size) as temporary:
        folder = temporary / version.ref
        adapter = PurePosixPath(version.adapter_path).name
        store.checkout_file(version.artifact, version.adapter_path, folder / adapter)
        for kind in records.keys() - {SIGNATURE}:
            for file in DOCUMENT_FILES.get(kind, ()):
                store.checkout_file(records[kind], file, folder / file)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        yield folder
