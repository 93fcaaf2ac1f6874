"""Verifies the signatures of C2PA manifests (https://c2pa.org), without a network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from lora_engine.data.containers import media_type
from lora_engine.data.rights import GenerationSign
from lora_engine.errors import DataError, SettingsError

_MAX_BYTES = 16 << 20
_OFFLINE = {"verify_trust": True, "remote_manifest_fetch": False, "ocsp_fetch": False}
_OF_SIGNER = "signingCredential."
"""First part of the codes that say something of the signer, not of the content."""


def require_c2pa(roots: Path | None) -> None:
    """Raises an error if signatures cannot be verified.

    Args:
        roots: See `verify_credentials`.

    Raises:
        SettingsError: The extra `c2pa` is not installed.
        DataError: The file of certificates cannot be read, or is not PEM.
    """
    if find_spec("c2pa") is None:
        raise SettingsError(
            "verifying C2PA signatures needs c2pa-python, which is not installed",
            where="c2pa",
            remedy="run: pip install 'loraline[c2pa]', or set c2pa to recognize",
        )
    if roots is not None:
        _read_roots(roots)


def verify_credentials(file: BinaryIO, roots: Path | None) -> GenerationSign:
    """Returns the state of the C2PA manifest in a file.

    `c2pa-valid` means that file and manifest are as they were signed, by a signer whose certificate leads to one of the
    trusted roots. `c2pa-untrusted` means the same by another signer, or one whose certificate has expired without a
    trusted timestamp. `c2pa-invalid` means that file or manifest were changed, or cannot be read.

    Args:
        file: An image with a manifest.
        roots: Root certificates as PEM; None trusts none.
    """
    import c2pa  # type: ignore[import-untyped]

    trust = {} if roots is None else {"trust": {"user_anchors": _read_roots(roots)}}
    kind = media_type(file)
    file.seek(0)
    try:
        with (
            c2pa.Context(c2pa.Settings.from_dict({"verify": _OFFLINE, **trust})) as context,
            c2pa.Reader(kind, file, context=context) as reader,
        ):
            state, results = str(reader.get_validation_state()), reader.get_validation_results()
    except c2pa.C2paError:
        return "c2pa-invalid"
    if state == "Trusted":
        return "c2pa-valid"
    codes = _failures(results)
    is_intact = state == "Valid" or (bool(codes) and all(code.startswith(_OF_SIGNER) for code in codes))
    return "c2pa-untrusted" if is_intact else "c2pa-invalid"


def _failures(results: Any) -> list[str]:
    active = (results or {}).get("activeManifest") or {}
    return [str(item.get("code")) for item in active.get("failure") or []]


def _read_roots(roots: Path) -> str:
    try:
        with roots.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(roots)) from None
    if len(content) > _MAX_BYTES or b"-----BEGIN CERTIFICATE-----" not in content:
        raise DataError("has no certificates", where=str(roots), allowed="root certificates as PEM")
    return content.decode("ascii", "replace")
