from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from lora_engine.bases.source import resolve_base
from lora_engine.data.pixels import to_image
from lora_engine.embedding.embedder import load_embedder
from lora_engine.embedding.embedder_source import EMBEDDER_TYPES, choose_embedders, resolve_embedder
from lora_engine.errors import SettingsError
from lora_engine.families import families
from tests.lora_engine.evaluation.embedders import BUILDERS, write_random_embedder

TEXTS = ["a star", "A much longer text than the sixteen tokens", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("types")
    return {name: write_random_embedder(root / name, name) for name in BUILDERS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def cached_in(hub: Path, repository: str, folder: Path) -> str:
    """Puts a folder into the cache of the hub; returns its commit."""
    place = hub / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("b" * 40)
    shutil.copytree(folder, place / "snapshots" / ("b" * 40))
    return "b" * 40


def images(height: int, width: int, count: int = 3) -> torch.Tensor:
    """Returns random images with 8 bits per channel."""
    drawn = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(height))
    return drawn.float() / 127.5 - 1.0


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (23, 61), (9, 8)])
@pytest.mark.parametrize("name", BUILDERS)
def test_images_are_prepared_and_embedded_as_transformers_does(
    folders: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = folders[name]
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert type(processor).__name__ == EMBEDDER_TYPES[name].processor
    pixels = images(*size)
    inputs = processor([to_image(image) for image in pixels], return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs) if name == "dinov2" else model.get_image_features(**inputs)
    expected = torch.nn.functional.normalize(output.pooler_output, dim=-1)
    vectors = load_embedder(folder).embed_images(pixels)
    torch.testing.assert_close(vectors, expected)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))


def test_embeddings_of_a_clip_equal_those_of_the_whole_model(clip_folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    pixels = images(16, 16)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        output = model(**tokens, pixel_values=pixels)
    embedder = load_embedder(clip_folder)
    torch.testing.assert_close(embedder.embed_images(pixels), output.image_embeds)
    torch.testing.assert_close(embedder.embed_texts(TEXTS), output.text_embeds)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_texts_of_a_siglip_are_lower_case_padded_and_without_a_mask(folders: dict[str, Path], name: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folders[name]).eval(), AutoTokenizer.from_pretrained(folders[name])
    lower = [text.lower() for text in TEXTS]
    tokens = tokenizer(lower, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        output = model.get_text_features(input_ids=tokens["input_ids"]).pooler_output
    vectors = load_embedder(folders[name]).embed_texts(TEXTS)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(output, dim=-1))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_texts_over_the_limit_are_found(folders: dict[str, Path], name: str) -> None:
    assert load_embedder(folders[name]).find_truncated(TEXTS) == [TEXTS[1]]


def test_texts_in_other_scripts_are_found_by_a_clip_and_not_by_a_siglip(folders: dict[str, Path]) -> None:
    texts = ["a red star", "ein grüner Stern, café 3 ★", "красная звезда", "a 星"]
    assert load_embedder(folders["clip"]).find_unreadable(texts) == texts[2:]
    assert load_embedder(folders["siglip"]).find_unreadable(texts) == []


def test_an_embedder_of_images_refuses_texts(folders: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="embeds no texts"):
        load_embedder(folders["dinov2"]).embed_texts(["a star"])


def test_a_large_batch_of_images_is_split(clip_folder: Path) -> None:
    pixels = images(16, 16, count=40)
    embedder = load_embedder(clip_folder)
    torch.testing.assert_close(embedder.embed_images(pixels)[33], embedder.embed_images(pixels[33:34])[0])


def test_the_fingerprint_follows_the_files(clip_folder: Path, tmp_path: Path) -> None:
    same = tmp_path / "copy"
    shutil.copytree(clip_folder, same)
    assert load_embedder(same).fingerprint == load_embedder(clip_folder).fingerprint
    (same / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    assert load_embedder(same).fingerprint != load_embedder(clip_folder).fingerprint


def test_the_embedded_embedder_is_that_of_earlier_reports() -> None:
    embedder = load_embedder()
    assert embedder.name == "tiny/clip"
    assert embedder.fingerprint == resolve_embedder("tiny").fingerprint()


@pytest.mark.parametrize(
    ("config", "weights", "problem"),
    [
        (None, True, r"it has no config\.json"),
        ({"model_type": "bert"}, True, "of the type 'bert'"),
        ({"model_type": ["clip"]}, True, "of the type"),
        ({"model_type": "clip"}, False, r"has no weights: no \.safetensors file"),
        ({"model_type": "clip"}, True, "weights of the embedder are missing"),
    ],
)
def test_a_folder_without_a_usable_embedder_is_refused(
    tmp_path: Path, config: dict[str, Any] | None, weights: bool, problem: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    if weights:
        (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(SettingsError, match=problem):
        load_embedder(tmp_path)


def test_damaged_weights_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "damaged"))
    (folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(SettingsError, match="cannot be loaded"):
        load_embedder(folder)


def test_missing_weights_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from lora_engine.formats.safetensors_io import write_safetensors

    shutil.copytree(clip_folder, tmp_path / "part")
    weights = load_file(clip_folder / "model.safetensors")
    del weights["visual_projection.weight"]
    write_safetensors(tmp_path / "part" / "model.safetensors", weights, {"format": "pt"})
    with pytest.raises(SettingsError, match=r"1 weights of the embedder are missing, first visual_projection\.weight"):
        load_embedder(tmp_path / "part")


def test_loading_restores_the_global_generator(clip_folder: Path) -> None:
    before = torch.random.get_rng_state()
    load_embedder(clip_folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_embedder_of_the_hub_is_read_from_the_cache(folders: dict[str, Path], hub: Path) -> None:
    commit = cached_in(hub, "org/dino", folders["dinov2"])
    for name in ("org/dino", f"org/dino@{commit}"):
        source = resolve_embedder(name)
        assert (source.label, source.model_type, source.reads_text) == (f"org/dino@{commit}", "dinov2", False)
    assert source.fingerprint() == resolve_embedder(str(folders["dinov2"])).fingerprint()


def test_an_embedder_that_is_not_cached_is_refused_offline(hub: Path) -> None:
    with pytest.raises(SettingsError, match="the embedder 'org/none' is not in the local Hugging Face cache"):
        resolve_embedder("org/none")
    with pytest.raises(SettingsError, match="neither a folder nor a hub id"):
        resolve_embedder("./nowhere/at/all")


def test_the_embedded_embedder_judges_the_embedded_base_only(base: Path, hub: Path) -> None:
    tiny = choose_embedders(None, None, resolve_base("tiny"))
    assert (tiny.text and tiny.text.label, tiny.image, tiny.missing) == ("tiny/clip", None, {})
    other = choose_embedders(None, None, resolve_base(str(base)))
    assert (other.text, other.image) == (None, None)
    assert families["sd"].embedder in other.missing["embedder"]
    assert families["sd"].image_embedder in other.missing["image_embedder"]
    with pytest.raises(SettingsError, match="seen nothing but the drawings"):
        choose_embedders("tiny", None, resolve_base(str(base)))


def test_the_default_embedders_of_a_family_are_taken_from_the_cache(
    folders: dict[str, Path], base: Path, hub: Path
) -> None:
    cached_in(hub, families["sd"].embedder, folders["clip"])
    cached_in(hub, families["sd"].image_embedder, folders["dinov2"])
    chosen = choose_embedders(None, None, resolve_base(str(base)))
    assert chosen.missing == {}
    assert [source and source.model_type for source in (chosen.text, chosen.image)] == ["clip", "dinov2"]
    none = choose_embedders("none", "none", resolve_base(str(base)))
    assert (none.text, none.image, none.missing) == (None, None, {})


def test_a_named_embedder_that_cannot_be_used_is_an_error(folders: dict[str, Path], base: Path, hub: Path) -> None:
    with pytest.raises(SettingsError, match="is a dinov2, which embeds no texts"):
        choose_embedders(str(folders["dinov2"]), None, resolve_base(str(base)))
    with pytest.raises(SettingsError, match="is not in the local Hugging Face cache"):
        choose_embedders(None, "org/none", resolve_base(str(base)))
