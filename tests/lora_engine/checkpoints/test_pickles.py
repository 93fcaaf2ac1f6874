from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import time
import types
import zipfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.errors import AdapterError
from lora_engine.formats.pickles import PICKLE_LIMITS, _wait, is_pickled, read_pickle, unpickled

forked = pytest.mark.usefixtures("forked_readers")

CONTENT = {
    "state_dict": {"half": torch.arange(6.0).reshape(2, 3).half(), "turned": torch.arange(6).reshape(2, 3).T},
    "global_step": 7,
    "names": ["a", None, True, 1.5, (2, 3)],
}


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))


def make_evil(path: Path, canary: Path, how: str) -> Path:
    evil = {"a": torch.ones(1), "b": Payload(canary)}
    if how == "raw":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "archive")
    return path


def assert_is_content(content: Any) -> None:
    assert content["global_step"] == 7
    assert content["names"] == ["a", None, True, 1.5, [2, 3]]
    assert content["state_dict"].keys() == CONTENT["state_dict"].keys()
    for name, tensor in CONTENT["state_dict"].items():
        assert torch.equal(content["state_dict"][name], tensor)
        assert content["state_dict"][name].dtype == tensor.dtype


@forked
@pytest.mark.parametrize("new", [True, False], ids=["archive", "legacy"])
def test_tensors_and_plain_values_are_read(new: bool, tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    assert_is_content(read_pickle(tmp_path / "x.pt"))


def test_the_real_reader_imports_no_module_beside_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong module was imported')")
    torch.save(CONTENT, tmp_path / "x.pt")
    monkeypatch.chdir(tmp_path)
    assert_is_content(read_pickle(Path("x.pt")))


def assert_payload_never_runs(how: str, folder: Path) -> None:
    canary = folder / "canary"
    path = make_evil(folder / "x.ckpt", canary, how)
    with pytest.raises(AdapterError, match="nothing else is read") as caught:
        read_pickle(path)
    assert str(path) in str(caught.value)
    assert "safetensors" in str(caught.value)
    assert not canary.exists()


@forked
@pytest.mark.parametrize("how", ["archive", "legacy", "raw"])
def test_a_payload_never_runs(how: str, tmp_path: Path) -> None:
    assert_payload_never_runs(how, tmp_path)


def test_a_payload_never_runs_in_the_real_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's variable for unrestricted unpickling must not reach the child.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert_payload_never_runs("archive", tmp_path)


@pytest.mark.parametrize("how", ["archive", "legacy", "raw"])
def test_the_payload_runs_if_pickles_are_trusted(how: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = make_evil(tmp_path / "x.ckpt", canary, how)
    if how == "raw":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.exists()


@forked
def test_the_extra_objects_of_the_first_checkpoints_are_named_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": {callback: {"best": 1}}, "more": callback()}
    torch.save(content, tmp_path / "x.ckpt")
    with unpickled(tmp_path / "x.ckpt") as file:
        assert file.dropped == ("callbacks: type", "more: Inert")
        assert {key for key, _ in file.content["dict"]} == {"state_dict", "callbacks"}


@forked
@pytest.mark.parametrize("new", [True, False], ids=["archive", "legacy"])
def test_a_tensor_that_claims_more_than_it_stores_is_refused(new: bool, tmp_path: Path) -> None:
    # Four bytes in the file, four terabytes when expanded.
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    with pytest.raises(AdapterError, match="4000000000000 bytes of tensors"):
        read_pickle(tmp_path / "x.pt")


@forked
@pytest.mark.parametrize(
    ("limits", "match"),
    [({"values": 5}, "holds 6 values"), ({"depth": 1}, "holds 2 levels"), ({"tensors": 1}, "holds 2 tensors")],
)
def test_a_file_over_a_limit_is_refused(limits: dict[str, int], match: str, tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match=match):
        read_pickle(tmp_path / "x.pt", limits=replace(PICKLE_LIMITS, **limits))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not honour the limit")
def test_the_memory_of_the_reader_is_bounded(tmp_path: Path) -> None:
    torch.save({"numbers": list(range(500_000))}, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="reading it takes more than the 1048576 bytes of memory"):
        read_pickle(tmp_path / "x.pt", limits=replace(PICKLE_LIMITS, memory=1 << 20))


@forked
def test_a_file_over_a_small_memory_limit_is_within_the_default(tmp_path: Path) -> None:
    torch.save({"numbers": list(range(500_000))}, tmp_path / "x.pt")
    assert read_pickle(tmp_path / "x.pt")["numbers"][-1] == 499_999


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what a process may take")
def test_a_reader_that_loops_without_memory_is_killed() -> None:
    code = """
import pathlib, resource, time
taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {free}, taken + {free}))
print("ready", flush=True)
time.sleep(60 if {free} < 1 << 20 else 0)
"""
    cases: list[tuple[int, AbstractContextManager[Any]]]
    cases = [(1 << 12, pytest.raises(MemoryError)), (1 << 26, contextlib.nullcontext())]
    for free, ends in cases:
        command = [sys.executable, "-S", "-c", code.format(free=free)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            with ends:
                assert _wait(child, time.monotonic() + 50) == 0
            child.kill()


def test_a_reader_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match="exceeded the limit of 0 seconds"):
        read_pickle(tmp_path / "x.pt", limits=replace(PICKLE_LIMITS, seconds=0))


def zipped(path: Path, entries: dict[str, bytes], method: int) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_a_zip_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.pt", {"x/data.pkl": b"", "x/data/0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(AdapterError, match="2 entries are compressed"):
        read_pickle(path)


def test_entries_that_claim_more_than_the_file_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.pt", {"x/data.pkl": b"abcd"}, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    central = raw.index(b"PK\x01\x02")
    for field in (20, 24):
        raw[central + field : central + field + 4] = (2_000_000_000).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match="claim 2000000000 bytes"):
        read_pickle(path)


@forked
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not saved by torch"),
        (b"PK\x03\x04 and nothing", "archive is damaged"),
        (b"\x80\x02garbage" * 10, "cannot be read"),
        (b"ustar" * 300, "not saved by torch"),
    ],
)
def test_damaged_files_are_refused_by_name(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(AdapterError, match=match) as caught:
        read_pickle(tmp_path / "broken.pt")
    assert "broken.pt" in str(caught.value)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        read_pickle(tmp_path / "none.pt")
    with pytest.raises(AdapterError, match="not a regular file"):
        read_pickle(tmp_path)


def test_pickles_and_safetensors_are_distinguished_by_content(tmp_path: Path) -> None:
    from safetensors.torch import save

    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer)
    (tmp_path / "a.safetensors").write_bytes(buffer.getvalue())
    (tmp_path / "b.safetensors").write_bytes(save({"a": torch.ones(1)}))
    assert is_pickled(tmp_path / "a.safetensors")
    assert not is_pickled(tmp_path / "b.safetensors")
