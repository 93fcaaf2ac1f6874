from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_engine.bases.base import load_base
from lora_engine.bases.single_file import cache_folder
from lora_engine.bases.source import resolve_base
from lora_engine.errors import BaseModelError


@pytest.fixture(scope="module")
def folder(untrained_base: Callable[[str], Path]) -> Path:
    """A base with the blocks of Stable Diffusion 1.5 and few channels."""
    return untrained_base("sd15")


@pytest.fixture
def single(
    untrained_file: Callable[[str], Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The same base as an original single file with its settings beside it; the cache is empty."""
    monkeypatch.setenv("LORALINE_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "models"
    shutil.copytree(folder, models / "narrow", ignore=shutil.ignore_patterns("*.safetensors"))
    return Path(shutil.copy(untrained_file("sd15"), models / "narrow.safetensors"))


@torch.no_grad()
def test_a_single_file_equals_its_original_base(single: Path, folder: Path) -> None:
    converted, plain = load_base(str(single), device="cpu"), load_base(str(folder), device="cpu")
    assert (converted.family, converted.name) == ("sd", "narrow.safetensors")
    assert converted.module_names() == plain.module_names()
    noisy = torch.randn(1, *plain.latent_shape((16, 16)), generator=torch.Generator().manual_seed(0))
    actual, expected = (
        base.predict(noisy, torch.tensor([500]), base.encode_text(["a star"])) for base in (converted, plain)
    )
    assert torch.equal(actual, expected)


def test_a_single_file_is_converted_once_per_content(single: Path, tmp_path: Path) -> None:
    first = resolve_base(str(single))
    written = (first.folder / "model_index.json").stat().st_mtime_ns
    copied = tmp_path / "elsewhere"
    shutil.copytree(single.parent, copied)
    (copied / single.name).rename(copied / "other.safetensors")
    (copied / "narrow").rename(copied / "other")
    second = resolve_base(str(copied / "other.safetensors"))
    assert (second.folder, second.fingerprint()) == (first.folder, first.fingerprint())
    assert (second.folder / "model_index.json").stat().st_mtime_ns == written
    assert second.label == "other.safetensors"


def test_other_settings_beside_the_file_make_another_base(single: Path) -> None:
    first = resolve_base(str(single))
    settings = single.parent / "narrow" / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("0.012", "0.013"))
    second = resolve_base(str(single))
    assert second.folder != first.folder
    assert second.fingerprint() != first.fingerprint()


def test_a_damaged_file_is_refused_and_leaves_no_folder(single: Path) -> None:
    single.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"narrow\.safetensors"):
        resolve_base(str(single))
    assert not [path for path in (cache_folder() / "bases").iterdir() if path.is_dir()]


def test_without_a_tokenizer_the_error_names_the_searched_files(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.rmtree(single.parent / "narrow" / "tokenizer")
    with pytest.raises(BaseModelError, match=r"needs the tokenizer.*vocab\.json"):
        resolve_base(str(single))


@pytest.mark.parametrize("name", ["model.txt", "model.pth"])
def test_a_file_with_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"\.ckpt"):
        resolve_base(str(tmp_path / name))


def test_a_file_has_no_revision(single: Path) -> None:
    with pytest.raises(BaseModelError, match="no revision 'main'"):
        resolve_base(str(single), "main")


def test_the_environment_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALINE_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("LORALINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/loraline")
