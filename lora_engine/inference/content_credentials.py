"""Signs generated images with C2PA (https://c2pa.org, version 2.1), without a network: no timestamp, no thumbnail.

The signature covers the whole file. Texts are therefore written before, and any later change makes the file invalid.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.errors import SettingsError
from lora_engine.inference.image_metadata import Drawing

ASSERTION = "org.loraline.adapters"
_ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Credentials:
    """A certificate and its private key.

    Attributes:
        chain: Certificates as PEM, the signer's first; without the root.
        key: Private key of the first as PEM, PKCS 8, not encrypted.
        algorithm: `es256`, `es384`, `es512` or `ed25519`.
    """

    chain: str
    key: str
    algorithm: str

    def __repr__(self) -> str:
        return f"Credentials({self.algorithm})"  # without the key

    @classmethod
    def read(cls, certificate: Path, key: Path) -> Credentials:
        """Reads the two files; the algorithm is that of the key.

        Raises:
            SettingsError: The extra `c2pa` is not installed, or a file is not what it should be.
        """
        _import_c2pa()
        chain, private = _read(certificate), _read(key)
        return cls(chain.decode("ascii", "replace"), private.decode("ascii", "replace"), _algorithm_of(private, key))

    def sign(self, content: bytes, media_type: str, drawing: Drawing, seed: int, size: tuple[int, int]) -> bytes:
        """Returns the signed file, which names the adapters and IPTC's digital source type.

        Args:
            content: PNG, WebP or JPEG.
            media_type: Its type, such as `image/png`.
            drawing: How it was generated.
            seed: Its seed.
            size: (height, width) in pixels.

        Raises:
            SettingsError: The certificate cannot sign content, such as a root, or the key is another's.
        """
        c2pa = _import_c2pa()
        settings = c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}})
        try:
            # Without a timestamp authority, nothing is sent.
            info = c2pa.C2paSignerInfo(self.algorithm, self.chain.encode(), self.key.encode(), None)
            with c2pa.Signer.from_info(info) as signer, c2pa.Context(settings) as context:
                builder = c2pa.Builder(_manifest(drawing, seed, size, media_type), context)
                signed = io.BytesIO()
                with builder:
                    builder.sign(signer, media_type, io.BytesIO(content), signed)
        except c2pa.C2paError as error:
            raise SettingsError(
                f"C2PA cannot sign with this certificate and key ({str(error)[:200]})",
                where="--sign-c2pa",
                allowed="a certificate for digital signatures with an extended usage such as emailProtection, its "
                "issuers but not the root, and its key",
                remedy="check both files",
            ) from error
        return signed.getvalue()


def _manifest(drawing: Drawing, seed: int, size: tuple[int, int], media_type: str) -> str:
    facts = drawing.facts(seed, size)
    source_type = f"{_SOURCE_TYPES}{drawing.source_type}"
    action = {"action": "c2pa.created", "digitalSourceType": source_type, "softwareAgent": _agent(drawing)}
    return json.dumps(
        {
            "claim_generator_info": [_agent(drawing)],
            "format": media_type,
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
                {"label": ASSERTION, "data": {"adapters": facts["adapters"], "base": facts["base"]}},
            ],
        }
    )


def _agent(drawing: Drawing) -> dict[str, str]:
    return {"name": "Loraline", "version": drawing.version}


def _import_c2pa() -> Any:
    try:
        import c2pa  # type: ignore[import-untyped]
    except ImportError:
        raise SettingsError(
            "signing images needs c2pa-python, which is not installed",
            where="--sign-c2pa",
            remedy="run: pip install 'loraline[c2pa]'",
        ) from None
    return c2pa


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"cannot be read ({error.strerror})", where=str(path)) from None
    if len(content) > _MAX_BYTES or b"-----BEGIN " not in content:
        raise SettingsError("is not PEM", where=str(path), allowed="a certificate chain and a private key as PEM")
    return content


def _algorithm_of(private: bytes, where: Path) -> str:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, EllipticCurvePrivateKey) and key.curve.name in _ALGORITHMS:
        return _ALGORITHMS[key.curve.name]
    raise SettingsError(
        "is not a private key that can sign",
        where=str(where),
        allowed="ECDSA (P-256, P-384, P-521) or Ed25519, PKCS 8 as PEM, not encrypted",
    )
