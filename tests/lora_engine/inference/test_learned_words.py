"""Learned words on a base: what texts read as, and that nothing of the base changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_engine.adapters import Adapter, attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.untrained import write_untrained_base
from lora_engine.errors import AdapterError
from lora_engine.formats import Card, read_bundle, write_adapter
from lora_engine.formats.embedding_files import read_embeddings
from lora_engine.formats.embeddings import Embedding
from lora_engine.inference.draw import draw_images
from lora_engine.inference.textual_inversion import attach_embeddings

SHAPES = ["small-sd", "small-sdxl", "small-flux"]


@pytest.fixture(scope="module", params=SHAPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(str(write_untrained_base(tmp_path_factory.mktemp("base") / "base", request.param)), device="cpu")


def rows_of(base: BaseModel, part: str) -> torch.Tensor:
    return base.modules[part].get_input_embeddings().weight.detach()  # type: ignore[operator,no-any-return]


def word(base: BaseModel, token: str, text: str) -> Embedding:
    vectors = {}
    for part in base.modules:
        if part.startswith("text_encoder"):
            tokenizer = getattr(base, part.replace("text_encoder", "tokenizer"))
            vectors[part] = rows_of(base, part)[tokenizer(text, add_special_tokens=False)["input_ids"]]
    counts = {len(value) for value in vectors.values()}
    return Embedding(token, {part: value[: min(counts)] for part, value in vectors.items()})


def same(one: BaseModel, texts: list[str], others: list[str]) -> bool:
    first, second = one.encode_text(texts), one.encode_text(others)
    return all(torch.equal(value, second[name]) for name, value in first.tensors.items())


def test_a_word_reads_as_the_rows_that_it_stands_for(base: BaseModel) -> None:
    known = word(base, "zorb", "ab")
    before, apart = base.encode_text(["a zorb b"]).tensors, base.encode_text(["zorbs azorb"]).tensors
    with attach_embeddings(base, [known]):
        if base.family != "flux":  # T5's words differ from CLIP's in where they begin
            assert same(base, ["a zorb b"], ["a ab b"])
        assert same(base, ["a ZORB, b"], ["a zorb, b"])
        found, elsewhere = base.encode_text(["a zorb b"]).tensors, base.encode_text(["zorbs azorb"]).tensors
    assert any(not torch.equal(value, before[name]) for name, value in found.items())
    assert all(torch.equal(value, apart[name]) for name, value in elsewhere.items())
    after = base.encode_text(["a zorb b"]).tensors
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_the_rows_of_the_base_are_not_touched(base: BaseModel) -> None:
    parts = [part for part in base.modules if part.startswith("text_encoder")]
    before = {part: rows_of(base, part).clone() for part in parts}
    layers = {part: base.modules[part].get_input_embeddings() for part in parts}  # type: ignore[operator]
    with attach_embeddings(base, [word(base, "zorb", "ab")], trainable=True) as words:
        conditioning = base.encode_text(["a zorb"])
        parts_of_loss = [value.square().sum() for value in conditioning.tensors.values() if value.requires_grad]
        torch.autograd.backward(torch.stack(parts_of_loss).sum())
        gradients = {name: value.grad for name, value in words.named_parameters()}
        assert gradients
        assert all(value is not None and value.abs().max() > 0 for value in gradients.values())
    assert all(torch.equal(before[part], rows_of(base, part)) for part in parts)
    assert all(base.modules[part].get_input_embeddings() is layer for part, layer in layers.items())  # type: ignore[operator]


def test_words_and_an_adapter_of_the_token_layer_go_together(tmp_path: Path) -> None:
    base = load_base(str(write_untrained_base(tmp_path / "base", "small-sd")), device="cpu")
    adapter = create_adapter(base, "text_encoder.*.token_embedding", generator=torch.Generator().manual_seed(1))
    plain = base.encode_text(["a b"])["states"]
    with attach(base, adapter), attach_embeddings(base, [word(base, "zorb", "ab")]):
        assert torch.equal(base.encode_text(["a b"])["states"], plain)
    assert torch.equal(base.encode_text(["a b"])["states"], plain)


def test_several_words_are_told_apart(base: BaseModel) -> None:
    one, two = word(base, "zorb", "ab"), word(base, "blix", "c")
    with attach_embeddings(base, [one, two]):
        both = base.encode_text(["a zorb blix"]).tensors
    with attach_embeddings(base, [two, one]):
        again = base.encode_text(["a zorb blix"]).tensors
        turned = base.encode_text(["a blix zorb"]).tensors
    assert all(torch.equal(value, again[name]) for name, value in both.items())
    assert any(not torch.equal(value, turned[name]) for name, value in both.items())


def test_the_end_of_a_text_is_found_behind_a_word(tmp_path: Path) -> None:
    # CLIP's older configurations take the greatest token for the end of the text.
    base = load_base(str(write_untrained_base(tmp_path / "base", "small-sdxl")), device="cpu")
    base.modules["text_encoder_2"].config.eos_token_id = 2  # type: ignore[union-attr]
    parts = ["text_encoder", "text_encoder_2"]
    ids = base.tokenizer("ab", add_special_tokens=False)["input_ids"]  # type: ignore[attr-defined]
    known = Embedding("zorb", {part: rows_of(base, part)[ids] for part in parts})
    with attach_embeddings(base, [known]):
        assert same(base, ["a zorb c"], ["a ab c"])
        assert not same(base, ["a zorb c"], ["a ba c"])


def test_what_does_not_fit_is_refused_and_leaves_the_base_alone(tmp_path: Path) -> None:
    base = load_base(str(write_untrained_base(tmp_path / "base", "small-sd")), device="cpu")
    fits = Embedding("zorb", {"text_encoder": torch.ones(1, 16)})
    bad = [
        ([Embedding("zorb", {"text_encoder_2": torch.ones(1, 16)})], "no 'text_encoder_2'"),
        ([Embedding("zorb", {"text_encoder": torch.ones(1, 15)})], "15 wide"),
        ([fits, Embedding("Zorb", {"text_encoder": torch.ones(1, 16)})], "twice"),
    ]
    tokenizer = base.tokenizer  # type: ignore[attr-defined]
    for words, problem in bad:
        with pytest.raises(AdapterError, match=problem):
            attach_embeddings(base, words)
        assert base.tokenizer is tokenizer  # type: ignore[attr-defined]
    with attach_embeddings(base, [fits]), pytest.raises(AdapterError, match="already"):
        attach_embeddings(base, [fits])


def test_pictures_are_drawn_with_the_words_of_a_file(tmp_path: Path) -> None:
    folder = write_untrained_base(tmp_path / "base", "small-sd")
    base = load_base(str(folder), device="cpu")
    adapter = create_adapter(base, "attention", generator=torch.Generator().manual_seed(1))
    words = [Embedding("zorb", {"text_encoder": torch.full((2, 16), 3.0)})]
    write_adapter(tmp_path / "both.safetensors", adapter, embeddings=words)
    nothing = Adapter({}, base.family, base.fingerprint)
    write_adapter(tmp_path / "word.safetensors", nothing, embeddings=words, card=Card(title="zorb"))
    assert read_bundle(tmp_path / "word.safetensors").embeddings == tuple(words)

    def pictures(name: str, *files: str) -> bytes:
        found = draw_images(
            "a zorb",
            tmp_path / name,
            base=str(folder),
            adapters=[(tmp_path / file, 1.0) for file in files],
            seeds=[1],
            steps=2,
        )
        return found[0].read_bytes()

    plain, both, alone = pictures("p"), pictures("b", "both.safetensors"), pictures("w", "word.safetensors")
    # The adapter is zero in effect: the word alone changes the picture, and in both files in the same way.
    assert both == alone
    assert plain != both
    with pytest.raises(AdapterError, match="twice"):
        pictures("t", "both.safetensors", "word.safetensors")


@pytest.mark.parametrize(("format_", "files"), [("kohya", 1), ("diffusers", 1)])
def test_words_alone_are_written_where_a_format_has_files_for_them(tmp_path: Path, format_: str, files: int) -> None:
    words = [Embedding("zorb", {"text_encoder": torch.ones(2, 16)})]
    written = write_adapter(tmp_path / "out", Adapter({}, "sd"), format=format_, embeddings=words)
    assert len(written) == files
    assert read_embeddings(tmp_path / "out") == words
    with pytest.raises(AdapterError, match="no modules"):
        write_adapter(tmp_path / "out", Adapter({}, "sd"), format=format_)
