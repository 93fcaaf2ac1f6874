from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.bases.base import load_base
from lora_engine.data.manifest import Manifest
from lora_engine.data.pixels import write_png
from lora_engine.errors import SettingsError
from lora_engine.families.sd.model import StableDiffusion
from lora_engine.training.cache import TensorCache, prune
from lora_engine.training.examples import Encoder, read_examples, text_encoder
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.captions import Captions

Tensors = dict[str, torch.Tensor]


class Maker:
    """Makes tensors from a number and records its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, number: int, size: int = 4) -> Callable[[], Tensors]:
        def make() -> Tensors:
            self.calls.append(number)
            return {"a": torch.full((size,), float(number)), "b": torch.tensor([number])}

        return make


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_cache_reads_tensors_of_another(tmp_path: Path) -> None:
    maker = Maker()
    first = TensorCache(tmp_path).get({"n": 1}, maker(1))
    second = TensorCache(tmp_path).get({"n": 1}, maker(1))
    assert maker.calls == [1]
    assert all(torch.equal(first[name], second[name]) for name in ("a", "b"))
    TensorCache(tmp_path).get({"n": 2}, maker(2))
    assert maker.calls == [1, 2]


def test_a_flipped_bit_anywhere_is_detected_and_recomputed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    maker = Maker()
    TensorCache(tmp_path).get({"n": 1}, maker(1))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        for position in range(len(whole)):
            broken = bytearray(whole)
            broken[position] ^= 1 << position % 8
            path.write_bytes(bytes(broken))
            tensors = TensorCache(tmp_path).get({"n": 1}, maker(1))
            assert torch.equal(tensors["a"], torch.ones(4))
            assert torch.equal(tensors["b"], torch.tensor([1]))
            assert tensors["a"].dtype == torch.float32
    # A few bits, such as padding, may have no effect.
    assert len(maker.calls) >= len(whole) - 8
    assert path.read_bytes() == whole
    assert "computed again" in caplog.text


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"", lambda data: data + b"x"])
def test_a_truncated_file_is_recomputed(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    maker = Maker()
    TensorCache(tmp_path).get({"n": 1}, maker(1))
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    TensorCache(tmp_path).get({"n": 1}, maker(1))
    TensorCache(tmp_path).get({"n": 1}, maker(1))
    assert maker.calls == [1, 1]


def test_a_valid_file_under_another_name_is_ignored(tmp_path: Path) -> None:
    maker = Maker()
    for number in (1, 2):
        TensorCache(tmp_path).get({"n": number}, maker(number))
    one, two = files(tmp_path)
    two.write_bytes(one.read_bytes())
    values = {number: TensorCache(tmp_path).get({"n": number}, maker(number))["b"].item() for number in (1, 2)}
    assert values == {1: 1, 2: 2}
    assert len(maker.calls) == 3


def test_memory_keeps_the_most_recently_used_within_its_budget(tmp_path: Path) -> None:
    maker = Maker()
    one = 4 * 4 + 8
    cache = TensorCache(tmp_path, budget=2 * one)
    for number in (1, 2, 1, 3, 1, 2):
        cache.get({"n": number}, maker(number), keep=False)
    # 3 evicted 2, since 1 had been used after it.
    assert maker.calls == [1, 2, 3, 2]
    assert files(tmp_path) == []
    big = TensorCache(tmp_path, budget=one - 1)
    for _ in range(2):
        big.get({"n": 1}, maker(1), keep=False)
    assert maker.calls[-2:] == [1, 1]


def test_concurrent_writers_leave_one_valid_file(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)
    results: list[Any] = []

    def work() -> None:
        def make() -> Tensors:
            barrier.wait(timeout=600)
            return {"a": torch.arange(1000.0)}

        results.append(TensorCache(tmp_path).get({"n": 1}, make)["a"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(value, torch.arange(1000.0)) for value in results)
    assert len(files(tmp_path)) == len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
    maker = Maker()
    TensorCache(tmp_path).get({"n": 1}, maker(1))
    assert maker.calls == []


def test_prune_removes_the_least_recently_used(tmp_path: Path) -> None:
    maker = Maker()
    cache = TensorCache(tmp_path / "latents")
    for number in (1, 2, 3):
        cache.get({"n": number}, maker(number))
    size = files(tmp_path)[0].stat().st_size
    for age, path in enumerate(files(tmp_path), start=1):
        os.utime(path, (10_000 * age, 10_000 * age))
    abandoned, fresh = tmp_path / ".a.partial", tmp_path / ".b.partial"
    for path in (abandoned, fresh):
        path.write_bytes(b"12345")
    os.utime(abandoned, (1, 1))
    oldest, *_, newest = files(tmp_path)
    # Reading the oldest makes it the newest.
    number = next(n for n in (1, 2, 3) if TensorCache(tmp_path)._path(_name({"n": n})).name == oldest.name)
    TensorCache(tmp_path / "latents").get({"n": number}, maker(number))
    assert prune(tmp_path, 2 * size) == size + 5
    assert oldest in files(tmp_path)
    assert newest in files(tmp_path)
    assert len(files(tmp_path)) == 2
    assert fresh.exists()
    assert prune(tmp_path, 2 * size) == 0
    assert prune(tmp_path, 0) == 2 * size
    assert prune(tmp_path / "nowhere", 0) == 0
    assert maker.calls == [1, 2, 3]


def _name(key: dict[str, object]) -> str:
    from lora_engine.files import canonical_json, sha256_bytes

    return sha256_bytes(canonical_json(key))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The number of images and texts that the bases of this test encoded."""
    counts = {"images": 0, "texts": 0}
    encode_images, encode_text = StableDiffusion.encode_images, StableDiffusion.encode_text

    def count_images(self: StableDiffusion, pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts["images"] += len(pixels)
        return encode_images(self, pixels, *rest)

    def count_texts(self: StableDiffusion, texts: Any, *rest: Any) -> Any:
        counts["texts"] += len(texts)
        return encode_text(self, texts, *rest)

    monkeypatch.setattr(StableDiffusion, "encode_images", count_images)
    monkeypatch.setattr(StableDiffusion, "encode_text", count_texts)
    return counts


def test_two_runs_share_encodings_and_a_changed_image_is_encoded_again(
    bases: dict[str, Path],
    dataset: Path,
    tmp_path: Path,
    settings: Callable[..., TrainSettings],
    encoded: dict[str, int],
) -> None:
    def run(name: str, **change: Any) -> dict[str, int]:
        encoded.update(images=0, texts=0)
        changed_settings = settings(**change)
        train(
            changed_settings, str(bases["small-sd"]), dataset, tmp_path / name, tmp_path / f"work {name}", cache=cache
        )
        return dict(encoded)

    cache = tmp_path / "cache"
    assert run("first", rank=2) == {"images": 5, "texts": 2}
    assert run("second", rank=3) == {"images": 0, "texts": 0}
    manifest = Manifest.load(dataset)
    changed = dataset / manifest.of_split("train")[0].file
    write_png(changed, torch.zeros(3, 16, 16))
    assert run("third", rank=2) == {"images": 1, "texts": 0}
    # Without a shared folder everything is encoded.
    encoded.update(images=0, texts=0)
    train(settings(rank=2), str(bases["small-sd"]), dataset, tmp_path / "alone", tmp_path / "work alone")
    assert encoded == {"images": 5, "texts": 2}
    for name in ("adapter.safetensors", "training.json"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_other_bases_and_caption_settings_share_nothing(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    examples = read_examples(dataset, Manifest.load(dataset), "train")[:1]
    count = 0
    for shape in ("small-sd", "small-sdxl"):
        base = load_base(str(bases[shape]), device="cpu")
        for captions in (Captions(), Captions(chunks=2), Captions(weights=True)):
            Encoder(base, tmp_path, captions).prepare(examples, [])
            count += 1
            assert len(files(tmp_path / "texts")) == count
    assert len(files(tmp_path / "latents")) == 2


def test_shuffled_captions_are_encoded_on_demand_and_not_written(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, encoded: dict[str, int]
) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    examples = tuple(
        replace(example, caption="a, b, c, d") for example in read_examples(dataset, Manifest.load(dataset), "train")
    )
    encoder = Encoder(base, tmp_path, Captions(shuffle=True))
    encoder.prepare(examples, [""])
    assert encoded["texts"] == len(files(tmp_path / "texts")) == 1
    first = encoder.conditioning(["b, a, d, c", "", "b, a, d, c"], (16, 16))
    assert encoded["texts"] == 2
    assert torch.equal(first["states"], encoder.conditioning(["b, a, d, c", "", "b, a, d, c"], (16, 16))["states"])
    assert encoded["texts"] == 2
    assert len(files(tmp_path / "texts")) == 1


def test_a_base_without_chunks_names_the_setting_to_change() -> None:
    class Other:
        name = "other"

        def encode_text(self, *_: Any) -> str:
            return "unchanged"

    other: Any = Other()
    conditioning: object = text_encoder(other, Captions())(["a"], (16, 16))
    assert conditioning == "unchanged"
    with pytest.raises(SettingsError, match=r"set captions\.chunks to 1"):
        text_encoder(other, Captions(chunks=2))(["a"], (16, 16))
