"""Writes the head of the log as a file with a detached signature, as public transparency logs take it.

No log is contacted: who posts both files gets a proof from the log of the time at which the head existed.
"""

from __future__ import annotations

from pathlib import Path

from lora_engine.files import atomic_write, canonical_json
from registry.documents.keys import read_private_key
from registry.errors import disk_errors
from registry.store.chain import Head


def write_head(head: Head, path: Path, key: Path, passphrase: bytes | None) -> tuple[Path, Path]:
    """Writes a head as JSON, and beside it its signature; returns both files.

    The signature is ECDSA with SHA-256 in DER over the bytes of the file, which `openssl dgst -sha256 -verify` and
    Rekor's type `hashedrekord` read.

    Args:
        head: The head.
        path: The file; that of the signature has the suffix `.sig` appended.
        key: PEM file of the private key.
        passphrase: Passphrase of the key; None means unencrypted.

    Raises:
        SignatureError: The key cannot be read.
        HomeError: The disk is full or read-only.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    content = canonical_json({"seq": head.seq, "digest": head.digest})
    signature = read_private_key(key, passphrase).sign(content, ec.ECDSA(hashes.SHA256()))
    signature_path = path.with_name(f"{path.name}.sig")
    with disk_errors(path):
        atomic_write(path, content)
        atomic_write(signature_path, signature)
    return path, signature_path
