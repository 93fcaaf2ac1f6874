"""Reads the bundle of a signature, and checks a folder of files against it. Needs no home.

A bundle is a Sigstore bundle of the OpenSSF package model-signing: a DSSE envelope around an in-toto statement with the
digest of each signed file. The exact form is required, so a changed bit that the signature does not cover is found too.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.documents import parse_json
from lora_engine.files import sha256_file
from registry.documents.keys import PublicKey, key_of
from registry.entities import is_digest
from registry.errors import SignatureError

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PREDICATE = "https://model_signing/signature/v1.0"
_PAYLOAD = "application/vnd.in-toto+json"
MAX_BUNDLE = 1 << 20
"""Bytes of a bundle that are read."""
FIRST_FILE = "signature.json"
"""The file of the first signature; those of other keys have the key in their names."""
_HEAD_FILE = "log-head.json"
_OTHER_FILE = re.compile(r"signature-[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class Signature:
    """The claims of a bundle, not verified.

    Args:
        key: Fingerprint of the signing key.
        subject: Name of the signed folder: `name@version`.
        digests: File of the folder -> SHA-256.
    """

    key: str
    subject: str
    digests: Mapping[str, str]


def file_of(key: str) -> str:
    """Returns the name of the file for the signature of another key than the first one."""
    return f"signature-{key[:16]}.json"


def head_file(file: str) -> str:
    """Returns the name of the file with the head of the log that a signature covers."""
    return _HEAD_FILE if file == FIRST_FILE else file.replace("signature", "log-head", 1)


def is_signature(file: str) -> bool:
    """Returns True if a file of this name has a signature."""
    return file == FIRST_FILE or _OTHER_FILE.fullmatch(file) is not None


def is_head(file: str) -> bool:
    """Returns True if a file of this name has the head of the log that a signature covers."""
    return file.startswith("log-head") and is_signature(file.replace("log-head", "signature", 1))


def parse_bundle(content: bytes) -> Signature:
    """Returns the claims of a bundle; checks only its form.

    Raises:
        SignatureError: It cannot be read, or has another form than `loraline sign` writes.
    """
    try:
        signature = _read_form(content)
    except (SignatureError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = error.problem if isinstance(error, SignatureError) else repr(error)
        raise SignatureError(f"the signature cannot be read ({problem})", remedy="sign again") from None
    if signature is None:
        raise SignatureError(
            "the signature has an unknown form", allowed=f"{_BUNDLE}, {_PREDICATE}", remedy="sign again"
        )
    return signature


def _read_form(content: bytes) -> Signature | None:
    bundle = _parse(content)
    key, envelope = str(bundle["verificationMaterial"]["publicKey"]["hint"]), bundle["dsseEnvelope"]
    (signed,) = envelope["signatures"]
    for encoded in (signed["sig"], envelope["payload"]):
        # Several texts decode to the same bytes.
        if base64.b64encode(base64.b64decode(encoded, validate=True)).decode() != encoded:
            return None
    statement = _parse(base64.b64decode(envelope["payload"]))
    (subject,), resources = statement["subject"], statement["predicate"]["resources"]
    digests = {str(entry["name"]): str(entry["digest"]) for entry in resources if entry["algorithm"] == "sha256"}
    is_known = statement["predicateType"] == _PREDICATE and is_digest(key)
    are_files = all(is_digest(digest) and Path(name).name == name for name, digest in digests.items())
    if not (is_known and are_files and len(digests) == len(resources)):
        return None
    return Signature(key, str(subject["name"]), digests) if content in _forms(key, signed["sig"], envelope) else None


def _parse(content: bytes) -> Any:
    return parse_json(content, "", SignatureError, max_bytes=MAX_BUNDLE)


def _forms(key: str, signature: str, envelope: Mapping[str, Any]) -> list[bytes]:
    """Returns a bundle in the forms in which the package writes it."""
    material = {"publicKey": {"hint": key}, "tlogEntries": []}
    envelope = {
        "payload": envelope["payload"],
        "payloadType": _PAYLOAD,
        "signatures": [{"sig": signature, "keyid": ""}],
    }
    bundle = {"mediaType": _BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return [json.dumps(bundle).encode(), json.dumps(bundle, separators=(",", ":")).encode()]


def key_problem(fingerprint: str, trusted: Sequence[PublicKey], owner: str = "trusted public keys of this home") -> str:
    """Returns why no signature of a key is accepted; empty if it is.

    Args:
        fingerprint: The key.
        trusted: The accepted keys.
        owner: What they are, for the message.
    """
    key = key_of(trusted, fingerprint)
    if key is None:
        return f"the signing key {fingerprint[:16]} is not among the {len(trusted)} {owner}"
    if key.has_expired():
        return f"the signing key {key.name!r} ({fingerprint[:16]}) expired on {key.valid_until}"
    return ""


def check_files(bundle: Path, folder: Path, key: Path, names: Sequence[str]) -> Iterator[str]:
    """Checks a signature and the files that it covers, and yields the problems.

    Args:
        bundle: File with the bundle.
        folder: Folder with the signed files, and possibly others.
        key: File with the public key.
        names: Files that the signature must cover.

    Raises:
        SignatureError: The bundle cannot be read, or the package model-signing is not installed.
    """
    from cryptography.exceptions import InvalidSignature

    library = signing_library(str(bundle))
    signature = parse_bundle(read_signed_file(bundle))
    verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=key).set_ignore_unsigned_files(True)
    try:
        verifier.verify(folder, bundle)
    except InvalidSignature:
        yield "the signature does not match the signed content: it was changed, or another key made it"
        return
    except (ValueError, OSError) as error:
        # The signature is valid, but the files differ from the signed ones.
        yield from _differences(signature, folder, names) or [f"the files differ from the signed ones ({error})"]
    else:
        yield from _differences(signature, folder, names)


def _differences(signature: Signature, folder: Path, names: Sequence[str]) -> list[str]:
    files = sorted({*names, *signature.digests})
    actual = {name: sha256_file(folder / name) for name in files if (folder / name).is_file()}
    return [
        f"{name}: signed with digest {signature.digests.get(name, 'none')}, but now has {actual.get(name, 'none')}"
        for name in files
        if name not in signature.digests or signature.digests[name] != actual.get(name)
    ]


def read_signed_file(path: Path) -> bytes:
    """Returns the bytes of a bundle; one that is too long is cut, and has no known form then."""
    with path.open("rb") as file:
        return file.read(MAX_BUNDLE + 1)


def signing_library(where: str) -> Any:
    """Imports the package model-signing.

    Raises:
        SignatureError: It is not installed.
    """
    try:
        import model_signing
    except ImportError as error:
        raise SignatureError(
            f"signatures need the package model-signing ({error})", where=where, remedy="pip install 'loraline[sign]'"
        ) from None
    return model_signing
