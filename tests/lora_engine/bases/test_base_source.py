from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from lora_engine.bases.hub import downloads
from lora_engine.bases.source import resolve_base
from lora_engine.bases.structure import base_module_shapes
from lora_engine.errors import BaseModelError, NotDownloadedError

COMMIT = "a" * 40


@pytest.fixture
def copy(untrained: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(untrained["small-sd"], tmp_path / "copy"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def fill_cache(cache: Path, folder: Path) -> Path:
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))


def test_a_diffusers_folder_is_found_with_its_family(untrained: dict[str, Path]) -> None:
    assert resolve_base(str(untrained["small-sd"])).family == "sd"
    assert resolve_base(str(untrained["small-sdxl"])).family == "sdxl"


def test_the_embedded_base_is_found_by_name() -> None:
    source = resolve_base("tiny")
    assert (source.family, source.label) == ("sd", "tiny")
    assert len(source.fingerprint()) == 64


def test_the_label_of_a_folder_has_no_path(copy: Path) -> None:
    assert resolve_base(str(copy)).label == "copy"


def test_the_fingerprint_depends_on_content_and_not_on_the_path(untrained: dict[str, Path], copy: Path) -> None:
    assert resolve_base(str(copy)).fingerprint() == resolve_base(str(untrained["small-sd"])).fingerprint()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
def test_one_changed_byte_changes_the_fingerprint(copy: Path, name: str) -> None:
    before = resolve_base(str(copy)).fingerprint()
    file = copy / name
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    assert resolve_base(str(copy)).fingerprint() != before


def test_files_that_are_not_loaded_do_not_change_the_fingerprint(copy: Path) -> None:
    before = resolve_base(str(copy)).fingerprint()
    (copy / "README.md").write_text("hello")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle, never read")
    assert resolve_base(str(copy)).fingerprint() == before


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no-such-folder") as error:
        resolve_base(str(tmp_path / "no-such-folder"))
    assert "diffusers folder" in error.value.allowed


def test_the_error_for_a_misspelled_name_names_the_closest() -> None:
    with pytest.raises(BaseModelError, match="did you mean 'tiny'"):
        resolve_base("tinny")


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no model_index\.json"):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "\xff" * 3])
def test_a_broken_index_is_refused_by_name(copy: Path, content: str) -> None:
    (copy / "model_index.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"model_index\.json"):
        resolve_base(str(copy))


def test_an_unknown_pipeline_is_refused_with_the_known_ones(copy: Path) -> None:
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "MysteryPipeline"}))
    with pytest.raises(BaseModelError, match=r"MysteryPipeline.*StableDiffusionXLPipeline"):
        resolve_base(str(copy))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(copy: Path, component: str) -> None:
    shutil.rmtree(copy / component)
    with pytest.raises(BaseModelError, match=component):
        resolve_base(str(copy))


def test_weights_only_as_pickles_are_refused_with_a_remedy(copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BaseModelError, match="can run code") as error:
        resolve_base(str(copy))
    assert "safetensors" in error.value.remedy


def test_the_fp16_variant_is_used_if_it_is_the_only_one(copy: Path) -> None:
    for path in copy.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert resolve_base(str(copy)).layout.variants == {"unet": "fp16", "vae": "fp16", "text_encoder": "fp16"}


def test_shards_are_listed_and_a_missing_one_is_named(copy: Path) -> None:
    unet = copy / "unet"
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / shard)
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert f"unet/{shard}" in resolve_base(str(copy)).layout.files
    (unet / shard).unlink()
    with pytest.raises(BaseModelError, match="00001-of-00001"):
        resolve_base(str(copy))


def test_shards_outside_the_folder_are_refused(copy: Path) -> None:
    unet = copy / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="same folder"):
        resolve_base(str(copy))


def test_a_folder_has_no_revision(copy: Path) -> None:
    with pytest.raises(BaseModelError, match="no revision 'main'"):
        resolve_base(str(copy), "main")


def test_a_hub_id_is_taken_from_the_cache_without_a_network(hub_cache: Path, untrained: dict[str, Path]) -> None:
    folder = fill_cache(hub_cache, untrained["small-sd"])
    for name in ("org/name", f"org/name@{COMMIT}"):
        source = resolve_base(name)
        assert (source.folder, source.revision, source.label) == (folder, COMMIT, f"org/name@{COMMIT}")
        assert source.fingerprint() == resolve_base(str(untrained["small-sd"])).fingerprint()


@pytest.mark.usefixtures("hub_cache")
def test_without_network_and_cache_the_error_names_every_alternative() -> None:
    with pytest.raises(BaseModelError) as error:
        resolve_base("stable-diffusion-v1-5/stable-diffusion-v1-5")
    text = str(error.value)
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5" in text
    assert "diffusers folder" in text
    assert "`tiny`" in text


def test_an_incomplete_base_in_the_cache_is_refused(hub_cache: Path, untrained: dict[str, Path]) -> None:
    folder = fill_cache(hub_cache, untrained["small-sd"])
    shutil.rmtree(folder / "unet")
    with pytest.raises(BaseModelError, match="the component 'unet' is missing"):
        resolve_base("org/name")


@pytest.mark.usefixtures("hub_cache")
def test_two_revisions_in_one_name_are_refused() -> None:
    with pytest.raises(BaseModelError, match="differ"):
        resolve_base("org/name@one", "two")


def test_finding_a_base_imports_no_torch(untrained: dict[str, Path]) -> None:
    code = (
        "import sys; from lora_engine.bases.source import resolve_base;"
        f"resolve_base({str(untrained['small-sd'])!r}).fingerprint();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_names_and_shapes_of_a_hub_base_need_its_configurations_alone(
    untrained: dict[str, Path], hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, asked, download = fill_cache(hub_cache, untrained["small-sd"]), [], huggingface_hub.snapshot_download

    def record(*arguments: object, **settings: object) -> object:
        asked.append(settings["allow_patterns"])
        return download(*arguments, **settings)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    for weights in [*snapshot.rglob("*.safetensors"), *snapshot.rglob("*.txt")]:
        weights.unlink()
    assert base_module_shapes("org/name") == base_module_shapes(untrained["small-sd"])
    assert asked == [None], "the cache has them"
    with pytest.raises(BaseModelError, match="there are no weights"):
        resolve_base("org/name")
    (snapshot / "text_encoder" / "config.json").unlink()
    asked.clear()
    with pytest.raises(BaseModelError, match=r"config\.json"):
        base_module_shapes("org/name")
    assert asked == [None, ["model_index.json", "*/config.json"]]


def test_without_downloads_a_missing_and_an_incomplete_base_are_named(
    untrained: dict[str, Path], hub_cache: Path
) -> None:
    with downloads(allowed=False):
        with pytest.raises(NotDownloadedError, match="'org/name@v1' is not on this machine, and a run downloads it"):
            resolve_base("org/name@v1")
        snapshot = fill_cache(hub_cache, untrained["small-sd"])
        assert resolve_base("org/name").folder == snapshot.resolve()
        (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(NotDownloadedError, match=r"is not complete on this machine \(there are no weights\)"):
            resolve_base("org/name")
        with downloads(allowed=True), pytest.raises(NotDownloadedError):  # the outer one decides
            resolve_base("org/name")
    with pytest.raises(BaseModelError, match="there are no weights"):
        resolve_base("org/name")
