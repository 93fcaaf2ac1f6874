"""Tests the contract of the store's backends on a folder, in memory, and on a local S3 server."""

import hashlib
import io
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from registry.entities import ArtifactRef
from registry.errors import DamagedBlob, MissingBlob, StoreError
from registry.home import Home
from registry.store.artifacts import Store, open_store
from registry.store.local import LocalBlobs
from registry.store.remote import FsspecBlobs, open_blobs

PART = 5 << 20
"""Bytes of one part of an S3 upload: the smallest that s3fs accepts; its default is 50 MiB."""
BIG = os.urandom(1 << 20) * 6  # more than one part
MIDDLE = BIG[: 3 << 20]
FOREVER = 1e12


def digest_of(content):
    return hashlib.sha256(content).hexdigest()


def write(blobs, content):
    digest = digest_of(content)
    blobs.write(digest, partial(io.BytesIO, content))
    return digest


def read(blobs, digest):
    with blobs.open(digest) as stream:
        return stream.read()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """Yields the address of a local S3 server."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    until = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < until:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()
    log.close()


@pytest.fixture
def bucket(s3, monkeypatch):
    """Yields the URL of a folder in a new bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", PART)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"b{uuid4().hex}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/loraline"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["folder", "file URL", "memory", "S3"])
def blobs(request, tmp_path):
    if request.param == "folder":
        return LocalBlobs(tmp_path / "blobs")
    if request.param == "file URL":
        return open_blobs((tmp_path / "with space").as_uri())
    if request.param == "memory":
        return open_blobs(f"memory://{uuid4().hex}")
    return open_blobs(request.getfixturevalue("bucket"))


def damage(blobs, digest, content=b"something else"):
    if isinstance(blobs, LocalBlobs):
        blobs.path(digest).parent.mkdir(parents=True, exist_ok=True)
        blobs.path(digest).write_bytes(content)
    else:
        blobs._fs.pipe_file(blobs._key(digest), content)


@pytest.mark.parametrize("content", [b"", b"some bytes", BIG], ids=["empty", "small", "big"])
def test_read_returns_what_was_written(blobs, content):
    digest = write(blobs, content)
    assert read(blobs, digest) == content
    assert blobs.exists(digest)
    assert blobs.actual_digest(digest) == digest
    assert list(blobs.digests()) == [digest]
    assert blobs.size(digest) == len(content)
    assert abs(blobs.age(digest) - time.time()) < 60
    assert list(blobs.orphans()) == []


def test_absent_blob_is_missing(blobs):
    digest = digest_of(b"never written")
    assert not blobs.exists(digest)
    assert not blobs.touch(digest)
    assert not blobs.remove(digest, FOREVER)
    for method in (blobs.open, blobs.actual_digest, blobs.quarantine):
        with pytest.raises(MissingBlob, match=digest):
            method(digest)


def test_damaged_blob_is_replaced(blobs):
    digest = write(blobs, b"some bytes")
    damage(blobs, digest)
    assert blobs.actual_digest(digest) == digest_of(b"something else")
    write(blobs, b"some bytes")
    assert read(blobs, digest) == b"some bytes"


class Broken(io.BytesIO):
    """A source that fails after its first block."""

    def read(self, size=-1):
        if self.tell():
            raise OSError("connection lost")
        return super().read(min(size, len(self.getbuffer()) - 1000))


@pytest.mark.parametrize(
    "source",
    [
        partial(io.BytesIO, b"other bytes"),
        partial(Broken, MIDDLE),
        partial(Broken, BIG),
    ],
    ids=["other bytes", "broken", "broken after a part"],
)
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_write_is_never_visible(blobs, source, existing):
    digest = digest_of(BIG)
    if existing:
        write(blobs, b"some bytes")
        damage(blobs, digest)
    with pytest.raises((StoreError, OSError), match=r"changed while|connection lost"):
        blobs.write(digest, source)
    assert blobs.exists(digest) == existing
    assert not existing or read(blobs, digest) == b"something else"
    assert list(blobs.orphans()) == []


def test_removed_blob_is_gone_after_the_next_collection(blobs):
    digest = write(blobs, b"some bytes")
    assert not blobs.remove(digest, blobs.age(digest) - 1)
    assert blobs.exists(digest)
    assert blobs.remove(digest, FOREVER)
    for entry in list(blobs.trash()):
        assert read(blobs, entry.name) == b"some bytes"
        assert abs(entry.modified - time.time()) < 60
        blobs.delete_from_trash(entry.name)
    assert not blobs.exists(digest)
    assert list(blobs.digests()) == list(blobs.trash()) == list(blobs.orphans()) == []


def test_writing_again_restores_a_removed_blob(blobs):
    digest = write(blobs, b"some bytes")
    blobs.remove(digest, FOREVER)
    write(blobs, b"some bytes")
    for entry in list(blobs.trash()):
        blobs.delete_from_trash(entry.name)
    assert read(blobs, digest) == b"some bytes"


def test_touched_blob_is_restored_from_the_trash(blobs):
    digest = write(blobs, b"some bytes")
    blobs.remove(digest, FOREVER)
    if blobs.touch(digest):
        assert list(blobs.trash()) == []
        assert read(blobs, digest) == b"some bytes"
    else:
        assert isinstance(blobs, LocalBlobs)
        assert not blobs.exists(digest)


def test_quarantined_blob_is_unchanged(blobs):
    digest = write(blobs, b"some bytes")
    damage(blobs, digest)
    where = blobs.quarantine(digest)
    assert digest in where
    assert not blobs.exists(digest)
    assert list(blobs.digests()) == list(blobs.orphans()) == []
    content = Path(where).read_bytes() if isinstance(blobs, LocalBlobs) else blobs._fs.cat_file(where)
    assert content == b"something else"


def test_orphan_is_listed_and_removed(blobs):
    write(blobs, b"some bytes")
    if isinstance(blobs, LocalBlobs):
        (blobs.folder / ".x.partial").write_bytes(b"half")
    else:
        blobs._fs.pipe_file(f"{blobs._root}/unfinished/x", b"half")
    (orphan,) = blobs.orphans()
    assert orphan.size == 4
    blobs.remove_orphan(orphan.name)
    assert list(blobs.orphans()) == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "A" * 64, "", "a" * 63])
def test_only_digests_name_blobs(blobs, name):
    for method in (blobs.open, blobs.exists, blobs.touch):
        with pytest.raises(StoreError, match="not a digest"):
            method(name)


def test_store_works_on_every_backend(blobs, tmp_path):
    store = Store(tmp_path / "unused", blobs)
    files = {"adapter.safetensors": MIDDLE, "deep/notes.txt": b"notes", "empty": b""}
    ref = store.put_files("adapter", files)
    assert ref == Store(tmp_path / "other").put_files("adapter", files)
    assert store.has(ref)
    assert store.verify(ref) == []
    assert store.touch(ref)
    store.checkout(ref, tmp_path / "out")
    assert {path: (tmp_path / "out" / path).read_bytes() for path in files} == files
    digest = store.files(ref)["adapter.safetensors"].sha256
    damage(blobs, digest)
    with pytest.raises(DamagedBlob, match=digest_of(b"something else")):
        store.checkout_file(ref, "adapter.safetensors", tmp_path / "one")
    assert not (tmp_path / "one").exists()
    blobs.quarantine(digest)
    assert len(store.verify(ref)) == 1
    assert not store.touch(ref)


WRITER = """
import sys
from pathlib import Path
import s3fs
from registry.store.artifacts import Store
from registry.store.remote import open_blobs
s3fs.S3FileSystem.default_block_size = int(sys.argv[3])
store = Store(Path("unused"), open_blobs(sys.argv[1]))
for number in range(3):
    store.put_files("manifest", {"same": b"the same for all" * 1000, "own": f"{sys.argv[2]} {number}".encode()})
print(store.put_files("adapter", {"a": b"x" * (6 << 20), "b": b"b"}).sha256)
"""


@pytest.mark.parametrize("kind", ["folder", "S3"])
def test_writers_at_once_lose_nothing(kind, tmp_path, spawn, request):
    url = str(tmp_path / "blobs") if kind == "folder" else request.getfixturevalue("bucket")
    children = [spawn(WRITER, url, number, PART) for number in range(4)]
    outputs = [child.communicate(timeout=240) for child in children]
    assert [child.returncode for child in children] == [0] * 4, outputs
    (digest,) = {out.strip() for out, _ in outputs}
    blobs = open_blobs(url)
    digests = list(blobs.digests())
    assert len(digests) == 3 + 1 + 4 * 3 * 2
    assert [blobs.actual_digest(entry) for entry in digests] == digests
    assert list(blobs.orphans()) == []
    assert Store(tmp_path, blobs).verify(ArtifactRef("adapter", digest, 0)) == []


KILLED = """
import io, sys, time
from hashlib import sha256
import s3fs
from registry.store.remote import open_blobs
s3fs.S3FileSystem.default_block_size = int(sys.argv[2])
class Slow(io.BytesIO):
    def read(self, size=-1):
        if self.tell() > 11 << 19:
            print("more than a part is written", flush=True)
            time.sleep(600)
        return super().read(min(size, 1 << 20))
content = b"x" * (6 << 20)
open_blobs(sys.argv[1]).write(sha256(content).hexdigest(), lambda: Slow(content))
"""


@pytest.mark.parametrize("kind", ["folder", "S3"])
def test_killed_writer_leaves_no_half_blob(kind, tmp_path, spawn, request):
    url = str(tmp_path / "blobs") if kind == "folder" else request.getfixturevalue("bucket")
    content = b"x" * (6 << 20)
    child = spawn(KILLED, url, PART)
    assert child.stdout.readline().startswith("more"), child.communicate()
    child.kill()
    child.communicate()
    blobs = open_blobs(url)
    assert list(blobs.digests()) == []
    assert not blobs.exists(digest_of(content))
    for orphan in list(blobs.orphans()):
        blobs.remove_orphan(orphan.name)
    assert read(blobs, write(blobs, content)) == content


def test_home_stores_its_blobs_at_the_url_of_its_settings(tmp_path, bucket, monkeypatch):
    home = Home.open(tmp_path / "home")
    assert open_store(home).blobs.folder == home.store / "blobs"
    (home.path / "loraline.yaml").write_text(f"store: {bucket}\n")
    ref = open_store(home).put_files("manifest", {"a": b"in the bucket"})
    assert list(home.store.rglob("*")) == []
    assert FsspecBlobs(bucket).exists(ref.sha256)
    monkeypatch.setenv("LORALINE_STORE_URL", (tmp_path / "elsewhere").as_uri())
    assert open_store(home).blobs.folder == tmp_path / "elsewhere"


def test_unknown_protocol_is_a_clear_error():
    with pytest.raises(StoreError, match=r"Protocol not known: carrier-pigeon.*s3://"):
        open_blobs("carrier-pigeon://coop/loraline")


def test_missing_package_names_the_extra(monkeypatch):
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StoreError, match=r'pip install "loraline\[s3\]"'):
        open_blobs("s3://bucket/folder")


def test_absent_bucket_is_a_clear_error(bucket):
    absent = open_blobs("s3://no-such-bucket-anywhere/x")
    digest = digest_of(b"x")
    for call in (partial(write, absent, b"x"), partial(absent.open, digest), lambda: list(absent.digests())):
        with pytest.raises(StoreError, match=r"no such bucket.*loraline\.yaml"):
            call()


def test_absent_credentials_are_a_clear_error(bucket, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
        write(open_blobs(bucket), b"x")


def test_server_that_does_not_respond_is_a_clear_error(bucket, monkeypatch):
    import s3fs

    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(StoreError, match="the store failed"):
            open_blobs(bucket).exists(digest_of(b"x"))
