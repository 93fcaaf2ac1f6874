"""Tests deliveries to a bucket of a local S3 server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_engine.files import sha256_bytes
from tests.flows.commands import say
from tests.flows.shared import Trained
from tests.flows.test_delivery_cli import actions, add_version, deliver, promote, write_targets
from tests.registry.test_registry_blobs import bucket, s3

__all__ = ["bucket", "s3"]


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


def test_a_bucket_gets_the_manifest_last_and_loses_a_withdrawn_version(
    trained: Trained, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    from tasks.operations.delivery_folder import _RemoteTarget

    written: list[str] = []
    write = _RemoteTarget.write

    def listed(self: Any, path: str, content: bytes | Path) -> None:
        written.append(path)
        write(self, path, content)

    monkeypatch.setattr(_RemoteTarget, "write", listed)
    write_targets(trained.home, {"name": "cloud", "to": f"{bucket}/loras", "layout": "comfyui"})
    promote(trained, 1)
    assert actions(deliver(trained)) == [("deliver", 1)]
    assert written == ["small.loraline.json", "small.safetensors", "small.png", "small.loraline.json"]
    assert actions(deliver(trained)) == []
    assert len(written) == 4
    fs = s3fs.S3FileSystem()
    root = f"{bucket.removeprefix('s3://')}/loras"
    manifest = json.loads(fs.cat_file(f"{root}/small.loraline.json"))
    assert manifest["state"] == "delivered"
    for name, file in manifest["files"].items():
        assert sha256_bytes(fs.cat_file(f"{root}/{name}")) == file["sha256"]
    add_version(trained)
    promote(trained, 2)
    say("revoke", "small@2", "--reason", "r", "--policy", "withdraw", home=trained.home.path)
    assert actions(deliver(trained)) == [("confirm", 1)], "2 was never delivered"
    say("unalias", "small@production", "--reason", "r", home=trained.home.path)
    assert actions(deliver(trained)) == [("recall", 1)]
    fs.invalidate_cache()
    assert [key.rpartition("/")[2] for key in fs.find(root)] == ["small.loraline.json"]


def test_a_bucket_that_does_not_exist_is_named(trained: Trained, bucket: str) -> None:
    write_targets(trained.home, {"name": "cloud", "to": "s3://no-such-bucket/loras", "layout": "comfyui"})
    promote(trained, 1)
    (report,) = deliver(trained, code=1)
    assert "no such bucket" in report["error"]
    assert "`to` in delivery.yaml" in report["error"]
