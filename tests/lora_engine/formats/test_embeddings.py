"""Tests embeddings: every program's form is read and written, alone and with an adapter."""

import json

import pytest
import torch
from law_adapters import NAMES, SDXL_NAMES, random_delta
from safetensors.torch import load_file, save_file

from lora_engine.adapters import Adapter
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.formats import (
    Card,
    Embedding,
    codecs,
    inspect,
    read_adapter,
    read_bundle,
    read_embeddings,
    write_adapter,
    write_embeddings,
)

ONE, TWO = "text_encoder", "text_encoder_2"
VECTORS = torch.arange(12.0).reshape(2, 6) / 7
WORD = Embedding("<zorb>", {ONE: VECTORS})
OTHER = Embedding("<other>", {ONE: VECTORS * 2})
WIDE = Embedding("zorb", {ONE: VECTORS, TWO: torch.ones(2, 1280)})


def a1111(vectors, name="zorb"):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": name, "step": 7}


PICKLED = {
    "A1111": (a1111(VECTORS), "zorb", VECTORS),
    "A1111 without a name": (a1111(VECTORS, None), "file", VECTORS),
    "kohya": ({"emb_params": VECTORS}, "file", VECTORS),
    "diffusers": ({"<zorb>": VECTORS[0]}, "<zorb>", VECTORS[:1]),
}


@pytest.mark.parametrize("case", PICKLED)
@pytest.mark.usefixtures("forked_readers")
def test_pickled_forms_are_read(case, tmp_path):
    content, token, vectors = PICKLED[case]
    torch.save(content, tmp_path / "file.pt")
    assert read_embeddings(tmp_path / "file.pt") == [Embedding(token, {ONE: vectors})]


STORED = {
    "kohya": ({"emb_params": VECTORS}, [Embedding("file", {ONE: VECTORS})]),
    "kohya of CLIP-G alone": ({"emb_params": torch.ones(1, 1280)}, [Embedding("file", {TWO: torch.ones(1, 1280)})]),
    "SDXL": (
        {"clip_l": VECTORS, "clip_g": torch.ones(2, 9)},
        [Embedding("file", {ONE: VECTORS, TWO: torch.ones(2, 9)})],
    ),
    "diffusers": ({"zorb": VECTORS}, [Embedding("zorb", {ONE: VECTORS})]),
    "diffusers, one vector": ({"<my.zorb>": VECTORS[0]}, [Embedding("<my.zorb>", {ONE: VECTORS[:1]})]),
    "several tokens": (
        {"<s2>": VECTORS[1], "<s1>": VECTORS[0]},
        [Embedding("<s1>", {ONE: VECTORS[0]}), Embedding("<s2>", {ONE: VECTORS[1]})],
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_safetensors_forms_are_read(case, tmp_path):
    tensors, expected = STORED[case]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "file.safetensors")
    assert read_embeddings(tmp_path / "file.safetensors") == expected


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("tokens", [[WORD], [WIDE], [OTHER, WIDE]], ids=["one", "SDXL", "two"])
def test_what_is_written_is_read_again(form, tokens, tmp_path):
    files = write_embeddings(tmp_path, tokens, form)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert read_embeddings(tmp_path) == sorted(tokens, key=lambda embedding: embedding.token)


def test_the_files_are_those_that_the_programs_look_for(tmp_path):
    assert [file.name for file in write_embeddings(tmp_path / "a", [WIDE], "kohya")] == ["zorb.safetensors"]
    assert set(load_file(tmp_path / "a" / "zorb.safetensors")) == {"clip_l", "clip_g"}
    assert [file.name for file in write_embeddings(tmp_path / "b", [WIDE], "diffusers")] == [
        "learned_embeds.safetensors",
        "learned_embeds_2.safetensors",
    ]
    assert set(load_file(tmp_path / "b" / "learned_embeds_2.safetensors")) == {"zorb"}
    assert [file.name for file in write_embeddings(tmp_path / "c", [WORD])] == ["zorb.safetensors"]
    assert set(load_file(tmp_path / "c" / "zorb.safetensors")) == {"emb_params"}
    assert read_embeddings(tmp_path / "c") == [WORD], "the token is kept if it cannot be a file name"
    with pytest.raises(SettingsError, match="embedding format"):
        write_embeddings(tmp_path, [WORD], "a1111")


def test_two_tokens_of_one_file_name_are_refused(tmp_path):
    tokens = [WORD, Embedding("Zorb", {ONE: VECTORS})]
    with pytest.raises(AdapterError, match="same file name as another"):
        write_embeddings(tmp_path, tokens)


def export(path, vectors):
    adapter = Adapter({"unet.a": random_delta("lora", (4, 4))}, "sd")
    return write_adapter(path, adapter, format="kohya", embeddings=[Embedding("zorb", {ONE: vectors})])


def test_the_token_of_an_export_replaces_neither_its_adapter_nor_the_token_of_another(tmp_path, caplog):
    export(tmp_path / "one.safetensors", VECTORS)
    export(tmp_path / "two.safetensors", VECTORS)  # the same embedding
    written = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for name in ("zorb", "Zorb"):
        with pytest.raises(AdapterError, match="'zorb' and the adapter have the same file name"):
            export(tmp_path / f"{name}.safetensors", VECTORS)
    with pytest.raises(AdapterError, match=r"'zorb\.safetensors' exists and holds something else"):
        export(tmp_path / "three.safetensors", 2 * VECTORS)
    assert written == {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert not caplog.records
    export(tmp_path / "one.safetensors", 2 * VECTORS)
    assert "zorb.safetensors is replaced" in caplog.text
    assert torch.equal(load_file(tmp_path / "zorb.safetensors")["emb_params"], 2 * VECTORS)


def test_a_token_that_is_too_long_for_a_file_name_is_refused(tmp_path):
    long = Embedding("\U0001f300" * 70, {ONE: VECTORS})
    with pytest.raises(AdapterError, match="cannot be the name of a file"):
        write_embeddings(tmp_path, [WORD, long])
    with pytest.raises(AdapterError, match="cannot be the name of a file"):
        write_adapter(
            tmp_path / "out", Adapter({"unet.a": random_delta("lora", (4, 4))}, "sd"), format="kohya", embeddings=[long]
        )
    assert not list(tmp_path.iterdir())


BAD = {
    "no token": ("", {ONE: VECTORS}, "invalid token"),
    "path": ("a/b", {ONE: VECTORS}, "path"),
    "control": ("a\nb", {ONE: VECTORS}, "invalid token"),
    "long": ("a" * 129, {ONE: VECTORS}, "128"),
    "NaN": ("a", {ONE: torch.full((1, 4), float("nan"))}, "NaN or infinite"),
    "integers": ("a", {ONE: torch.ones(1, 4, dtype=torch.int32)}, "dtype"),
    "cube": ("a", {ONE: torch.ones(1, 1, 4)}, r"\[1, 1, 4\]"),
    "number": ("a", {ONE: torch.tensor(1.0)}, r"shape \[\]"),
    "empty": ("a", {ONE: torch.ones(0, 4)}, r"\[0, 4\]"),
    "counts": ("a", {ONE: VECTORS, TWO: torch.ones(1, 4)}, "different numbers"),
    "another encoder": ("a", {"/../../victim/mine": VECTORS}, "no text encoder '/../../victim/mine'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_embedding_is_refused(case):
    token, vectors, rule = BAD[case]
    with pytest.raises(AdapterError, match=rule):
        Embedding(token, vectors)


def test_a_bad_file_is_refused_with_its_name(tmp_path):
    save_file({"emb_params": torch.full((1, 4), float("inf"))}, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterError, match=r"bad\.safetensors.*NaN or infinite"):
        read_embeddings(tmp_path / "bad.safetensors")
    save_file({"unet.a.lora_down.weight": torch.ones(1, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match=r"other\.safetensors: unknown format of a textual"):
        read_embeddings(tmp_path / "other.safetensors")


def test_widths_are_checked_against_the_base(tmp_path):
    save = Adapter({"unet.a": random_delta("lora", (4, 4))}, "sd")
    write_adapter(tmp_path, save, embeddings=[WORD])
    token_embedding = "text_encoder.text_model.embeddings.token_embedding"
    assert read_bundle(tmp_path, {"unet.a": (4, 4), token_embedding: (9, 6)}).embeddings == (WORD,)
    with pytest.raises(AdapterError, match=r"'<zorb>': the vectors of text_encoder are 6 wide. Allowed: 7"):
        read_bundle(tmp_path, {"unet.a": (4, 4), token_embedding: (9, 7)})


@pytest.mark.parametrize("form", [name for name, codec in codecs.items() if "lora" in codec.key_layout.factor_keys])
def test_embeddings_travel_with_an_adapter_in_every_format(form, tmp_path):
    names = NAMES if form == "cloneofsimo" else SDXL_NAMES
    base = "sd" if form == "cloneofsimo" else "sdxl"
    tokens = [Embedding("<s1>", {ONE: VECTORS[0]}), Embedding("<s2>", {ONE: VECTORS[1]})]
    if form != "cloneofsimo":
        tokens.append(WIDE)
    adapter = Adapter({name: random_delta("lora", shape) for name, shape in names.items()}, base)
    settings = {"format": form, "embeddings": tokens, "module_names": names}
    files = write_adapter(tmp_path / "out", adapter, card=Card(title="Zorb"), **settings)
    assert sorted(files) == sorted(file for file in (tmp_path / "out").rglob("*") if file.is_file())
    bundle = read_bundle(tmp_path / "out", names)
    assert list(bundle.embeddings) == tokens
    assert bundle.card == Card(title="Zorb")
    assert bundle.adapter.modules.keys() == adapter.modules.keys()
    entries = inspect(tmp_path / "out")["embeddings"]
    assert [entry["token"] for entry in entries] == [embedding.token for embedding in tokens]
    assert entries[0] == {"token": "<s1>", "vectors": 1, "widths": {ONE: 6}, "dtypes": ["float32"]}
    assert len(inspect(tmp_path / "out")["files"]) == len(files)


def test_other_programs_bundles_are_read(tmp_path):
    tensors = codecs["kohya"].encode(Adapter({"unet.a": random_delta("lora", (4, 4))}, "sd"))
    more = {
        "bundle_emb.one.string_to_param.*": VECTORS,
        "bundle_emb.two.emb_params": VECTORS * 2,
        "bundle_emb.my.three.clip_l": VECTORS * 3,
        "bundle_emb.my.three.clip_g": torch.ones(2, 1280),
    }
    save_file(tensors[0] | more, tmp_path / "pack.safetensors", metadata=tensors[1])
    bundle = read_bundle(tmp_path / "pack.safetensors")
    assert [embedding.token for embedding in bundle.embeddings] == ["my.three", "one", "two"]
    assert bundle.embeddings[0].widths == {ONE: 6, TWO: 1280}
    assert read_adapter(tmp_path / "pack.safetensors")[0] == bundle.adapter
    save_file(tensors[0] | {"bundle_emb.a.clip_l_out": VECTORS}, tmp_path / "out.safetensors", metadata=tensors[1])
    with pytest.raises(AdapterError, match="output embeddings"):
        read_bundle(tmp_path / "out.safetensors")


@pytest.mark.usefixtures("forked_readers")
def test_an_embedding_alone_is_inspected_and_is_no_adapter(tmp_path):
    torch.save(a1111(VECTORS), tmp_path / "zorb.pt")
    report = json.loads(json.dumps(inspect(tmp_path / "zorb.pt")))
    assert (report["format"], report["modules"], report["kinds"]) == ("embedding", [], {})
    assert report["embeddings"] == [{"token": "zorb", "vectors": 2, "widths": {ONE: 6}, "dtypes": ["float32"]}]
    assert list(report["files"]) == ["zorb.pt"]
    with pytest.raises(AdapterError, match="textual-inversion embedding"):
        read_adapter(tmp_path / "zorb.pt")


def test_embeddings_are_cast_with_the_adapter(tmp_path):
    adapter = Adapter({"unet.a": random_delta("lora", (4, 4))}, "sd")
    write_adapter(tmp_path, adapter, embeddings=[WORD], dtype=torch.float16)
    assert read_bundle(tmp_path).embeddings[0].vectors[ONE].dtype == torch.float16
