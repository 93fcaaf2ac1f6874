"""Tests the header's `modelspec.*` against the standard: https://github.com/Stability-AI/ModelSpec, version 1.0.1."""

import hashlib
import json
import struct

import pytest

from lora_engine.adapters import Adapter
from lora_engine.formats import Card, read_adapter, write_adapter
from lora_engine.formats.codec import codecs
from lora_engine.formats.safetensors_io import read_header
from tests.laws.law_adapters import random_delta

MUST = ("sai_model_spec", "architecture", "implementation", "title")
NAME = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CARD = Card(
    title="Zorb",
    base="tiny",
    trigger="zorb",
    class_word="ring",
    license="CC-BY-4.0",
    resolution="32x32",
    prediction="eps",
    recipe={"method": {"name": "dreambooth"}, "parents": ["Red sha256:" + "a" * 64, "Blue"]},
)


def adapter_of(base: str, width: int) -> Adapter:
    name = NAME if base in {"sd", "sdxl"} else "transformer.transformer_blocks.0.attn.to_q"
    return Adapter({name: random_delta("lora", (8, width), 4, 2.0)}, base)


def body_of(path) -> bytes:
    content = path.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


@pytest.mark.parametrize("form", sorted(set(codecs) - {"bfl", "xlabs", "cloneofsimo"}))  # read-only, or needs a base
def test_every_format_has_the_entries_that_the_standard_requires(form, tmp_path):
    files = write_adapter(tmp_path / form, adapter_of("sd", 768), format=form, card=CARD)
    written = [file for file in files if file.suffix == ".safetensors"]
    assert written
    for path in written:
        header = read_header(path)[1]
        assert all(header.get(f"modelspec.{key}") for key in MUST), form
        assert header["modelspec.sai_model_spec"] == "1.0.1"
        assert header["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body_of(path)).hexdigest()}"
        assert "modelspec.date" not in header


def test_the_header_has_the_entries_of_the_card(tmp_path):
    path = write_adapter(tmp_path, adapter_of("sd", 768), format="kohya", card=CARD)[0]
    header = read_header(path)[1]
    entries = {key.removeprefix("modelspec."): text for key, text in header.items() if key.startswith("modelspec.")}
    assert entries.pop("hash_sha256") == f"0x{header['sshs_model_hash']}"
    assert entries == {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1/lora",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": "Zorb",
        "resolution": "32x32",
        "prediction_type": "epsilon",
        "license": "CC-BY-4.0",
        "trigger_phrase": "zorb",
        "usage_hint": "Trigger: zorb",
        "merged_from": "Red, Blue",
        "tags": "lora, dreambooth, ring",
    }


@pytest.mark.parametrize(
    ("base", "width", "prediction", "architecture", "resolution"),
    [
        ("sd", 768, "eps", "stable-diffusion-v1/lora", "512x512"),
        ("sd", 1024, "eps", "stable-diffusion-v2-512/lora", "512x512"),
        ("sd", 1024, "v_prediction", "stable-diffusion-v2-768-v/lora", "768x768"),
        ("sdxl", 2048, "eps", "stable-diffusion-xl-v1-base/lora", "1024x1024"),
        ("flux", 64, "flow", "flux-1-dev/lora", "1024x1024"),
        ("sd3", 64, "flow", "stable-diffusion-3/lora", "1024x1024"),
    ],
)
def test_architecture_follows_the_base(base, width, prediction, architecture, resolution, tmp_path):
    path = write_adapter(tmp_path, adapter_of(base, width), card=Card(prediction=prediction))[0]
    header = read_header(path)[1]
    assert header["modelspec.architecture"] == architecture
    assert header["modelspec.resolution"] == resolution
    assert header["modelspec.title"], "a title is required, and the card has none"


def test_our_own_entries_are_recomputed_and_not_carried_over(tmp_path):
    first = write_adapter(tmp_path / "first", adapter_of("sd", 768), card=CARD)[0]
    adapter, card = read_adapter(first)
    assert card.extra == {}
    again = write_adapter(tmp_path / "again", adapter, card=card)[0]
    assert again.read_bytes() == first.read_bytes()
    other = write_adapter(tmp_path / "other", adapter, card=card.model_copy(update={"title": "Other"}))[0]
    assert read_header(other)[1]["modelspec.title"] == "Other"


def test_another_programs_date_and_author_are_carried_over_but_not_its_digest(tmp_path):
    path = write_adapter(tmp_path / "first", adapter_of("sd", 768), card=CARD)[0]
    adapter, card = read_adapter(path)
    external = {"modelspec.date": "2024-01-02", "modelspec.author": "Ada", "modelspec.hash_sha256": "0x00"}
    card = card.model_copy(update={"extra": external})
    header = read_header(write_adapter(tmp_path / "second", adapter, card=card)[0])[1]
    assert (header["modelspec.date"], header["modelspec.author"]) == ("2024-01-02", "Ada")
    assert header["modelspec.hash_sha256"] != "0x00"


def test_old_cards_are_still_read():
    old = json.dumps({"title": "Zorb", "base": "tiny"})
    assert Card.model_validate_json(old).resolution is None


def test_the_training_is_stated_as_kohya_does_where_the_card_knows_it(tmp_path):
    card = CARD.model_copy(update={"data": ["a", "b", "c"]})
    header = read_header(write_adapter(tmp_path / "known", adapter_of("sd", 768), format="kohya", card=card)[0])[1]
    assert header["ss_num_train_images"] == "3"
    assert header["ss_resolution"] == "(32, 32)"
    assert json.loads(header["ss_tag_frequency"]) == {"ring": {"zorb": 3}}
    bare = read_header(write_adapter(tmp_path / "bare", adapter_of("sd", 768), format="kohya")[0])[1]
    assert not {"ss_num_train_images", "ss_resolution", "ss_tag_frequency", "ss_output_name"} & bare.keys()


@pytest.mark.parametrize("form", sorted(set(codecs) - {"bfl", "xlabs", "cloneofsimo"}))
def test_an_output_name_is_the_file_name_where_programs_take_any(form, tmp_path):
    files = write_adapter(tmp_path, adapter_of("sd", 768), format=form, card=CARD, output_name="zorb-v3")
    (path,) = (file for file in files if file.suffix == ".safetensors")
    own = codecs[form].format
    assert path.relative_to(tmp_path).name == ("zorb-v3.safetensors" if own.is_renamable else own.file_name)
    header = read_header(path)[1]
    assert header["modelspec.title"] == "Zorb"
    assert header.get("ss_output_name", "zorb-v3") == "zorb-v3"
    named = write_adapter(tmp_path / "x", adapter_of("sd", 768), format=form, output_name="zorb-v3")
    assert read_header(next(file for file in named if file.suffix == ".safetensors"))[1]["modelspec.title"] == "zorb-v3"
    assert read_adapter(tmp_path / "x")[0] == read_adapter(path)[0]
