import errno
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_engine.files
from registry.entities import ArtifactRef
from registry.errors import DamagedBlob, HomeError, MissingBlob, StoreError
from registry.store.artifacts import Store

FILES = {"a.txt": b"first", "deep/b.bin": bytes(range(256)), "deep/empty": b""}


@pytest.fixture
def folder(tmp_path):
    for relative, content in FILES.items():
        path = tmp_path / "source" / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "source"


def blob_of(store, ref, relative):
    return store.blobs.path(store.files(ref)[relative].sha256)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checkout_equals_what_was_put(store, folder, tmp_path):
    ref = store.put("manifest", folder)
    store.checkout(ref, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES
    assert ref.size == sum(map(len, FILES.values()))
    assert {path: store.read(ref, path) for path in store.files(ref)} == FILES
    assert store.has(ref)
    assert store.verify(ref) == []


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}(/[a-z0-9]{1,8}x)?", fullmatch=True), st.binary(), min_size=1))
def test_same_content_has_same_digest_in_any_order(store, files):
    files = {f"{path}.f": content for path, content in files.items()}
    forwards = store.put_files("manifest", files)
    backwards = store.put_files("manifest", dict(reversed(files.items())))
    assert forwards == backwards
    assert {path: store.read(forwards, path) for path in store.files(forwards)} == files


def test_other_kind_other_name_or_other_bytes_are_another_artifact(store):
    refs = [
        store.put_files("manifest", {"a": b"1"}),
        store.put_files("adapter", {"a": b"1"}),
        store.put_files("manifest", {"b": b"1"}),
        store.put_files("manifest", {"a": b"2"}),
    ]
    assert len({ref.sha256 for ref in refs}) == 4


def test_put_twice_writes_once(store, folder):
    ref = store.put("manifest", folder)

    def blobs():
        return {path: path.stat().st_ino for path in (store.folder / "blobs").glob("??/*")}

    before = blobs()
    assert store.put("manifest", folder) == ref
    assert blobs() == before


@pytest.mark.parametrize("harm", [lambda old: bytes([old[0] ^ 1]) + old[1:], lambda old: old[:-1], lambda old: b""])
def test_changed_bytes_are_never_read(store, folder, tmp_path, harm):
    ref = store.put("manifest", folder)
    blob = blob_of(store, ref, "deep/b.bin")
    blob.write_bytes(harm(blob.read_bytes()))
    digest, actual = blob.name, lora_engine.files.sha256_file(blob)
    for read in (lambda: store.read(ref, "deep/b.bin"), lambda: store.checkout(ref, tmp_path / "out")):
        with pytest.raises(DamagedBlob) as caught:
            read()
        assert digest in str(caught.value)
        assert actual in str(caught.value)
    assert [digest in problem.what for problem in store.verify(ref)] == [True]
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".*")) == []
    assert store.read(ref, "a.txt") == b"first"


def test_missing_bytes_are_named(store, folder, tmp_path):
    ref = store.put("manifest", folder)
    blob = blob_of(store, ref, "a.txt")
    blob.unlink()
    with pytest.raises(MissingBlob, match=blob.name):
        store.checkout(ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not store.has(ref)
    assert "a.txt" in store.verify(ref)[0].where


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b'{"files":{}}')])
def test_lost_or_changed_list_of_files_is_found(store, folder, harm):
    ref = store.put("manifest", folder)
    harm(store.blobs.path(ref.sha256))
    assert not store.has(ref)
    assert len(store.verify(ref)) == 1


def test_list_of_another_kind_is_refused(store, folder):
    ref = store.put("manifest", folder)
    with pytest.raises(DamagedBlob, match="manifest"):
        store.files(ArtifactRef("adapter", ref.sha256, ref.size))


def test_stored_list_with_a_path_outside_the_tree_is_refused(store, tmp_path):
    evil = b'{"files":{"../../evil":{"sha256":"' + b"0" * 64 + b'","size":1}},"kind":"manifest"}'
    container = store.put_files("manifest", {"evil": evil})
    ref = ArtifactRef("manifest", store.files(container)["evil"].sha256, 1)
    with pytest.raises(StoreError, match="invalid path"):
        store.checkout(ref, tmp_path / "out")


def test_put_repairs_a_damaged_blob(store, folder):
    ref = store.put("manifest", folder)
    blob_of(store, ref, "a.txt").write_bytes(b"fIrst")
    assert store.verify(ref)
    store.put("manifest", folder)
    assert store.verify(ref) == []


def test_link_is_refused(store, folder):
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match="link"):
        store.put("manifest", folder)


def test_linked_folder_is_refused(store, folder, tmp_path):
    (folder / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="elsewhere"):
        store.put("manifest", folder)
    (tmp_path / "name").symlink_to(folder)
    with pytest.raises(StoreError, match="name"):
        store.put("manifest", tmp_path / "name")


def test_pipe_is_refused_without_waiting(store, folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(StoreError, match="pipe"):
        store.put("manifest", folder)


@pytest.mark.parametrize(
    "relative", ["../x", "/x", "a//b", "a/./b", "", "a\\b", "a\0b", "a/../../b", "new\nline", "x" * 256]
)
def test_path_that_leaves_the_tree_or_is_not_portable_is_refused(store, relative):
    with pytest.raises(StoreError, match="invalid path"):
        store.put_files("manifest", {relative: b"x"})


def test_empty_artifact_is_refused(store, tmp_path):
    (tmp_path / "nothing" / "in here").mkdir(parents=True)
    with pytest.raises(StoreError, match="has no files"):
        store.put("manifest", tmp_path / "nothing")


def test_missing_folder_is_refused(store, tmp_path):
    with pytest.raises(StoreError, match="not a folder"):
        store.put("manifest", tmp_path / "absent")


def test_checkout_never_overwrites_files(store, folder, tmp_path):
    ref = store.put("manifest", folder)
    with pytest.raises(StoreError, match="not an empty folder"):
        store.checkout(ref, folder)
    (tmp_path / "empty").mkdir()
    store.checkout(ref, tmp_path / "empty")
    assert contents(tmp_path / "empty") == FILES


def test_checkout_of_one_file_is_verified(store, folder, tmp_path):
    ref = store.put("manifest", folder)
    store.checkout_file(ref, "a.txt", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"first"
    blob_of(store, ref, "a.txt").write_bytes(b"fIrst")
    with pytest.raises(DamagedBlob):
        store.checkout_file(ref, "a.txt", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(StoreError, match="'absent'"):
        store.read(ref, "absent")


def test_checked_out_files_are_ordinary_files(store, folder, tmp_path):
    ref = store.put("manifest", folder)
    store.checkout(ref, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    (tmp_path / "out" / "a.txt").write_bytes(b"changed by its user")
    assert store.read(ref, "a.txt") == b"first"


def test_source_that_changes_meanwhile_is_refused(store, folder, monkeypatch):
    write = store.blobs.write

    def change_first(digest, source):
        (folder / "a.txt").write_bytes(b"other")
        write(digest, source)

    monkeypatch.setattr(store.blobs, "write", change_first)
    with pytest.raises(StoreError, match="changed"):
        store.put("manifest", folder)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_every_write_leaves_no_half_artifact(folder, tmp_path, monkeypatch, call):
    whole = Store(tmp_path / "whole").put("manifest", folder)
    real = {"fsync": os.fsync, "replace": lora_engine.files.Path.replace}[call]
    for fault in range(1, 100):
        store, calls = Store(tmp_path / f"store{fault}"), iter(range(1, 1000))

        def failing(*arguments, fault=fault, calls=calls):
            if next(calls) == fault:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os if call == "fsync" else lora_engine.files.Path, call, failing)
            try:
                assert store.put("manifest", folder) == whole
                break
            except HomeError as error:
                message = str(error)
        assert "disk is full" in message
        assert list(store.folder.rglob("*.partial")) == []
        assert [store.blobs.actual_digest(digest) for digest in store.blobs.digests()] == list(store.blobs.digests())
        assert store.put("manifest", folder) == whole
        assert store.verify(whole) == []
    assert fault > 4


def test_two_processes_putting_the_same_tree_agree(store, tmp_path, spawn):
    files = tmp_path / "many"
    files.mkdir()
    for number in range(60):
        (files / f"{number}.bin").write_bytes(os.urandom(2000))
    script = """
import sys, pathlib
from registry.store.artifacts import Store
print(Store(pathlib.Path(sys.argv[1])).put("manifest", pathlib.Path(sys.argv[2])).sha256)
"""
    children = [spawn(script, store.folder, files) for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    ref = ArtifactRef("manifest", outputs[0][0].strip(), 60 * 2000)
    assert store.verify(ref) == []
    assert list(store.blobs.orphans()) == []
    assert len(list(store.blobs.digests())) == 61


@pytest.mark.parametrize(
    "broken",
    [
        {"kind": "adapter", "sha256": "A" * 64, "size": 1},
        {"kind": "adapter", "sha256": "a" * 64, "size": -1},
        {"kind": "../x", "sha256": "a" * 64, "size": 1},
    ],
)
def test_broken_reference_is_refused(broken):
    with pytest.raises(StoreError):
        ArtifactRef(**broken)
