from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lora_engine.errors import SettingsError
from lora_engine.evaluation.embedder import load_embedder


def test_embeddings_equal_those_of_the_model(clip_folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    pixels, texts = torch.rand(3, 3, 16, 16) * 2 - 1, ["a star", "a much longer text than the sixteen tokens", ""]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        output = model(**tokens, pixel_values=pixels)
    embedder = load_embedder(clip_folder)
    torch.testing.assert_close(embedder.embed_images(pixels), output.image_embeds)
    torch.testing.assert_close(embedder.embed_texts(texts), output.text_embeds)


def test_embeddings_of_images_of_any_size_have_length_one(clip_folder: Path) -> None:
    embedder = load_embedder(clip_folder)
    for shape in ((1, 3, 16, 16), (2, 3, 40, 24), (40, 3, 8, 8)):
        vectors = embedder.embed_images(torch.rand(shape) * 2 - 1)
        assert vectors.shape == (shape[0], 8)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(shape[0]))


def test_the_fingerprint_follows_the_files(clip_folder: Path, tmp_path: Path) -> None:
    same = tmp_path / "copy"
    shutil.copytree(clip_folder, same)
    assert load_embedder(same).fingerprint == load_embedder(clip_folder).fingerprint
    (same / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    assert load_embedder(same).fingerprint != load_embedder(clip_folder).fingerprint


def test_a_folder_without_an_embedder_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no config\.json of a CLIPModel"):
        load_embedder(tmp_path)
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(SettingsError, match="cannot be loaded"):
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
