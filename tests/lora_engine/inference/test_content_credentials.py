"""C2PA manifests of generated images: signed offline, verified by the library of the specification's authors."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any, get_args

import c2pa
import pytest

from lora_engine.data.evidence import read_evidence
from lora_engine.errors import SettingsError
from lora_engine.inference.content_credentials import ASSERTION, Credentials
from lora_engine.inference.image_files import MEDIA_TYPES, ImageFormat, ImageOptions, encode_image, read_used_adapters
from tests.lora_engine.inference.drawings import make_adapter, make_drawing, make_image
from tests.support.certificates import Signer, write_signer


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return write_signer(tmp_path_factory.mktemp("signer"))


def verify(content: bytes, media_type: str, signer: Signer) -> tuple[str, dict[str, Any]]:
    """Returns the state and the active manifest, with the test's root as the only trusted one."""
    trust = {"verify": {"verify_trust": True}, "trust": {"user_anchors": signer.root.read_text()}}
    with (
        c2pa.Context(c2pa.Settings.from_dict(trust)) as context,
        c2pa.Reader(media_type, io.BytesIO(content), context=context) as reader,
    ):
        store = json.loads(reader.json())
        return str(reader.get_validation_state()), store["manifests"][store["active_manifest"]]


@pytest.mark.parametrize("kind", get_args(ImageFormat))
def test_a_signed_image_is_trusted_until_one_bit_changes(tmp_path: Path, signer: Signer, kind: ImageFormat) -> None:
    adapter = make_adapter(tmp_path, "zorb@3")
    drawing = make_drawing("a <lora:zorb@3:0.7>", [adapter])
    options = ImageOptions(kind, credentials=Credentials.read(signer.chain, signer.key))
    content, media_type = encode_image(make_image(), drawing, 7, options), MEDIA_TYPES[kind]
    state, manifest = verify(content, media_type, signer)
    assert state == "Trusted"
    assert "thumbnail" not in manifest
    own = {entry["label"]: entry["data"] for entry in manifest["assertions"]}
    (used,) = own[ASSERTION]["adapters"]
    digests = (adapter.sha256, adapter.sha256[:10], adapter.body_sha256[:12])
    assert (used["sha256"], used["autov2"], used["autov3"]) == digests
    (action,) = own["c2pa.actions.v2"]["actions"]
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    changed = bytearray(content)
    changed[-40] ^= 1  # of the pixels
    assert verify(bytes(changed), media_type, signer)[0] == "Invalid"
    path = tmp_path / "image"
    path.write_bytes(content)
    assert read_used_adapters(path) == {"zorb@3": adapter.sha256}
    assert "c2pa-trained-algorithmic-media" in read_evidence(path, tmp_path)


def test_another_root_does_not_trust_the_image(tmp_path: Path, signer: Signer) -> None:
    other = write_signer(tmp_path)
    options = ImageOptions(credentials=Credentials.read(signer.chain, signer.key))
    content = encode_image(make_image(), make_drawing("a", []), 7, options)
    assert verify(content, "image/png", other)[0] == "Valid"


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, signer: Signer) -> None:
    other = write_signer(tmp_path)
    options = ImageOptions(credentials=Credentials.read(signer.chain, other.key))
    with pytest.raises(SettingsError, match="C2PA cannot sign"):
        encode_image(make_image(), make_drawing("a", []), 7, options)


def test_what_is_no_certificate_or_key_is_refused(tmp_path: Path, signer: Signer) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "broken").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    for chain, key, problem in (
        (tmp_path / "missing", signer.key, "missing: cannot be read"),
        (tmp_path / "text", signer.key, "text: is not PEM"),
        (signer.chain, tmp_path / "broken", "broken: is not a private key that can sign"),
        (signer.chain, signer.chain, "is not a private key that can sign"),
    ):
        with pytest.raises(SettingsError, match=problem):
            Credentials.read(chain, key)
    assert "PRIVATE" not in repr(Credentials.read(signer.chain, signer.key))


def test_without_the_extra_the_error_names_it(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(SettingsError, match=r"pip install 'loraline\[c2pa\]'"):
        Credentials.read(signer.chain, signer.key)
