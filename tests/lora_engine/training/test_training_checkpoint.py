from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_engine.training import checkpoint as module
from lora_engine.training.cache import TensorCache
from lora_engine.training.checkpoint import Checkpoint, Checkpoints


def save(folder: Path, step: int, job: str = "job") -> None:
    Checkpoints(folder, job).save(step, Checkpoint({"a": torch.full((3,), float(step))}, {"step": step}))


def step_of(folder: Path, job: str = "job") -> int | None:
    checkpoint = Checkpoints(folder, job).load()
    if checkpoint is None:
        return None
    assert torch.equal(checkpoint.tensors["a"], torch.full((3,), float(checkpoint.facts["step"])))
    return int(checkpoint.facts["step"])


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    assert step_of(tmp_path) is None
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert step_of(tmp_path) == 10
    assert len(list(tmp_path.iterdir())) == 2


def test_an_altered_checkpoint_is_skipped(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = max(tmp_path.iterdir())
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert step_of(tmp_path) == 1


@pytest.mark.parametrize("length", [0, 7, 50])
def test_a_truncated_checkpoint_is_skipped(tmp_path: Path, length: int) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:length])
    assert step_of(tmp_path) == 1


def test_the_checkpoint_of_another_job_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, 5, job="other")
    assert step_of(tmp_path) is None
    assert step_of(tmp_path, job="other") == 5


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert step_of(tmp_path) == 1


def test_the_same_state_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / name, 3)
    assert [path.name for path in (tmp_path / "one").iterdir()] == [path.name for path in (tmp_path / "two").iterdir()]


def test_cached_tensors_are_computed_once_and_restored_bit_for_bit(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.rand(4, generator=torch.Generator().manual_seed(len(calls)))}

    first = TensorCache(tmp_path).get({"picture": "a"}, make)["x"]
    again = TensorCache(tmp_path, budget=0)
    assert torch.equal(again.get({"picture": "a"}, make)["x"], first)
    assert len(calls) == 1
    assert not torch.equal(again.get({"picture": "b"}, make)["x"], first)


def test_a_broken_cache_file_is_recomputed(tmp_path: Path) -> None:
    TensorCache(tmp_path).get({"a": 1}, lambda: {"x": torch.ones(2)})
    file = next(tmp_path.glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(TensorCache(tmp_path).get({"a": 1}, lambda: {"x": torch.ones(2)})["x"], torch.ones(2))
    assert torch.equal(TensorCache(tmp_path).get({"a": 1}, lambda: {"x": torch.zeros(2)})["x"], torch.ones(2))
