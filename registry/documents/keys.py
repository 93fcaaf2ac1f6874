"""Makes elliptic-curve key pairs and reads the public keys that a home trusts (`keys/*.pub`).

A public key may have an expiry date, in the text that PEM allows before the key (RFC 7468, section 5.2).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.files import atomic_write, sha256_bytes
from registry.entities import now
from registry.errors import SignatureError, disk_errors
from registry.home import Home

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

FOLDER = "keys"
KEY_SUFFIX = ".pub"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_UNTIL = re.compile(rb"^Valid-Until: (\d{4}-\d{2}-\d{2})\s*$", re.MULTILINE)
_MAX_BYTES = 64 << 10
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublicKey:
    """A trusted public key.

    Args:
        path: Its file.
        fingerprint: SHA-256 of the key in PEM; signatures refer to it.
        valid_until: Last valid day; None means no expiry.
    """

    path: Path
    fingerprint: str
    valid_until: date | None = None

    @property
    def name(self) -> str:
        """The name of its file, without suffix."""
        return self.path.stem

    def has_expired(self, at: datetime | None = None) -> bool:
        """Returns True if the last valid day is over (UTC)."""
        end = self.valid_until and datetime.combine(self.valid_until, time.max, UTC)
        return end is not None and (at or now()) > end


def make_key(path: Path, passphrase: bytes | None, *, valid_until: date | None = None) -> PublicKey:
    """Makes a key pair: the private key in a file that only its owner can read, the public key beside it.

    Args:
        path: File of the private key; the public key's file has `.pub` appended.
        passphrase: Passphrase that encrypts the private key; None leaves it unencrypted.
        valid_until: Last day on which signatures of the key are valid; None means no expiry.

    Raises:
        SignatureError: One of the files exists.
    """
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    public_path = path.with_name(path.name + KEY_SUFFIX)
    for file in (path, public_path):
        if file.exists():
            raise SignatureError("the file exists", where=str(file), remedy="name another file")
    key = ec.generate_private_key(ec.SECP256R1())
    lock = pem.BestAvailableEncryption(passphrase) if passphrase else pem.NoEncryption()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock)
    until = f"Valid-Until: {valid_until.isoformat()}\n" if valid_until else ""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Private before its first byte: atomic_write would make it readable by others at the end.
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(secret)
        atomic_write(public_path, until.encode() + _public_pem(key.public_key()))
    return read_public_key(public_path)


def trust_key(home: Home, path: Path) -> PublicKey:
    """Adds a public key to the trusted keys of a home.

    Raises:
        SignatureError: The file has no usable public key, or another key of that name is trusted.
    """
    key = read_public_key(path)
    target = home.path / FOLDER / f"{key.name}{KEY_SUFFIX}"
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise SignatureError(f"another key {key.name!r} is trusted", where=str(target), remedy="rename one of them")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, path.read_bytes())
    return read_public_key(target)


def trusted_keys(home: Home) -> list[PublicKey]:
    """Returns the trusted public keys of a home, sorted by name; logs a warning about a file without one."""
    keys = []
    for path in sorted((home.path / FOLDER).glob(f"*{KEY_SUFFIX}")):
        try:
            keys.append(read_public_key(path))
        except SignatureError as error:
            _logger.warning("%s: %s; its signatures are not trusted", path, error.problem)
    return keys


def read_public_key(path: Path) -> PublicKey:
    """Reads the public key of a file.

    Raises:
        SignatureError: The file does not exist or has no public key on one of `CURVES`.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        content = path.read_bytes()[:_MAX_BYTES]
        key = pem.load_pem_public_key(content)
        until = _UNTIL.search(content.partition(b"-----BEGIN")[0])
        last = date.fromisoformat(until[1].decode()) if until else None
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(f"this is not a public key ({error})", path) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _no_key("this is a key of an unsupported type", path)
    return PublicKey(path, fingerprint(key), last)


def read_private_key(path: Path, passphrase: bytes | None) -> EllipticCurvePrivateKey:
    """Reads the private key of a file.

    Raises:
        SignatureError: The file does not exist, the passphrase is wrong or missing, or the file has no private key on
            one of `CURVES`.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = pem.load_pem_private_key(path.read_bytes(), passphrase or None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"the private key cannot be read ({error})", where=str(path), remedy="check the file and the passphrase"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise _no_key("this is a key of an unsupported type", path)
    return key


def is_encrypted(path: Path) -> bool:
    """Returns True if the file is a private key that needs a passphrase."""
    try:
        return b"ENCRYPTED" in path.read_bytes()[:_MAX_BYTES]
    except OSError:
        return False


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """Returns the SHA-256 of the public key in PEM, by which bundles of the model-signing package identify a key."""
    return sha256_bytes(_public_pem(key))


def key_of(keys: Sequence[PublicKey], fingerprint: str) -> PublicKey | None:
    """Returns the key with that fingerprint, preferably one that has not expired; None if there is none."""
    matches = [key for key in keys if key.fingerprint == fingerprint]
    return min(matches, key=lambda key: key.has_expired(), default=None)


def _public_pem(key: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as pem

    return key.public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)


def _no_key(problem: str, path: Path) -> SignatureError:
    return SignatureError(
        problem,
        where=str(path),
        allowed=f"PEM files of keys on {', '.join(_CURVES)}",
        remedy="`loraline keys new FILE`",
    )
