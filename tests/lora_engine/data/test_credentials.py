"""Signatures of C2PA manifests: valid, by an untrusted signer, or invalid; without a network."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import get_args

import pytest

from lora_engine.data import credentials
from lora_engine.data.evidence import read_evidence
from lora_engine.data.ingest import ingest
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError, SettingsError
from lora_engine.inference.content_credentials import Credentials
from lora_engine.inference.image_files import ImageFormat, ImageOptions, encode_image
from tests.lora_engine.data.test_evidence import SIGNED, after_the_pixels
from tests.lora_engine.inference.drawings import make_drawing, make_image
from tests.support.certificates import Signer, write_signer

GENERATED = ("c2pa-manifest", "c2pa-trained-algorithmic-media")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return write_signer(tmp_path_factory.mktemp("signer"))


def sign(signer: Signer, kind: ImageFormat = "png") -> bytes:
    options = ImageOptions(kind, credentials=Credentials.read(signer.chain, signer.key))
    return encode_image(make_image(), make_drawing("a zorb", []), 7, options)


def state_of(path: Path, roots: Path | None) -> str:
    (state,) = {*read_evidence(path, path.parent, verifies=True, roots=roots)} & {
        "c2pa-valid",
        "c2pa-untrusted",
        "c2pa-invalid",
    }
    return state


@pytest.mark.parametrize("kind", get_args(ImageFormat))
def test_a_signature_is_valid_untrusted_or_invalid(tmp_path: Path, signer: Signer, kind: ImageFormat) -> None:
    path = tmp_path / "image"
    path.write_bytes(sign(signer, kind))
    assert state_of(path, signer.root) == "c2pa-valid"
    assert state_of(path, None) == "c2pa-untrusted"
    (tmp_path / "other").mkdir()
    assert state_of(path, write_signer(tmp_path / "other").root) == "c2pa-untrusted"
    changed = bytearray(path.read_bytes())
    changed[-40] ^= 1  # of the pixels
    path.write_bytes(bytes(changed))
    assert state_of(path, signer.root) == "c2pa-invalid"
    # What it says of its origin counts in every state.
    assert {*GENERATED} < {*read_evidence(path, tmp_path, verifies=True)}
    assert not {"c2pa-valid", "c2pa-untrusted", "c2pa-invalid"} & {*read_evidence(path, tmp_path)}


def test_a_signer_whose_certificate_expired_is_not_trusted(tmp_path: Path) -> None:
    signer = write_signer(tmp_path, days=-1)
    path = tmp_path / "image"
    path.write_bytes((SIGNED / "captured.avif").read_bytes())
    assert state_of(path, None) == "c2pa-untrusted"
    with pytest.raises(SettingsError, match="C2PA cannot sign"):
        sign(signer)


def test_a_manifest_that_cannot_be_read_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(after_the_pixels(b"caBX", b"\0\0\0\x20jumb c2pa" + bytes(40)))
    assert state_of(path, None) == "c2pa-invalid"


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the paths that were requested of it."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/ocsp", seen
        finally:
            server.shutdown()
            thread.join()


def test_nothing_is_asked_of_a_server(tmp_path: Path, requests: tuple[str, list[str]]) -> None:
    address, seen = requests
    signer = write_signer(tmp_path, ocsp=address)
    path = tmp_path / "image"
    path.write_bytes(sign(signer, "jpeg"))
    assert state_of(path, signer.root) == "c2pa-valid"
    assert seen == []


def test_ingest_records_and_reports_the_state(
    images: Path, tmp_path: Path, signer: Signer, caplog: pytest.LogCaptureFixture
) -> None:
    intact = sign(signer)
    (images / "good.png").write_bytes(intact)
    changed = bytearray(sign(signer, "jpeg"))
    changed[-40] ^= 1  # a JPEG is decoded all the same
    (images / "changed.jpg").write_bytes(changed)
    (images / "photo.avif").write_bytes((SIGNED / "captured.avif").read_bytes())
    settings = IngestSettings(c2pa="verify")
    with caplog.at_level(logging.WARNING):
        manifest = ingest(images, tmp_path / "out", settings, c2pa_roots=signer.root)
    stated = {entry.source: entry.rights.describe_generation() for entry in manifest.pictures if entry.rights}
    sign_of = "a1111-parameters, c2pa-trained-algorithmic-media, digital-source-type-trained-algorithmic-media"
    assert stated == {
        "changed.jpg": f"generated ({sign_of}, signature invalid: the file was changed, or the manifest is of another "
        "one)",
        "good.png": f"generated ({sign_of}, signature valid)",
        "photo.avif": "content credentials (C2PA), signature untrusted: intact, by a signer who is not among the "
        "trusted ones",
    }
    assert "1 images: signature invalid: the file was changed" in caplog.text
    plain = ingest(images, tmp_path / "plain", IngestSettings())
    photo = next(entry.rights for entry in plain.pictures if entry.source == "photo.avif")
    assert photo is not None
    assert not photo.is_generated
    assert photo.describe_generation() == "content credentials (C2PA), signature not verified"


def test_what_cannot_be_verified_with_is_refused(
    images: Path, tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "a.png").write_bytes(sign(signer))
    settings = IngestSettings(c2pa="verify")
    for roots, problem in ((signer.key, "has no certificates"), (tmp_path / "missing.pem", "cannot be read")):
        with pytest.raises(DataError, match=problem):
            ingest(images, tmp_path / "out", settings, c2pa_roots=roots)
    monkeypatch.setattr(credentials, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'loraline\[c2pa\]'"):
        ingest(images, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
