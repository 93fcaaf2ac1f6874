"""Learned tokens on a base: their encodings, and the untouched weights of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_engine.adapters import Adapter, attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.errors import AdapterError
from lora_engine.formats import Card, read_bundle, write_adapter
from lora_engine.formats.embedding_files import read_embeddings
from lora_engine.formats.embeddings import Embedding
from lora_engine.inference.draw import Drawer, DrawSettings
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.textual_inversion import attach_embeddings
from tests.support.untrained import write_untrained_base

SHAPES = ["small-sd", "small-sdxl", "small-flux"]


@pytest.fixture(scope="module", params=SHAPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(str(write_untrained_base(tmp_path_factory.mktemp("base") / "base", request.param)), device="cpu")


def rows_of(base: BaseModel, part: str) -> torch.Tensor:
    return base.modules[part].get_input_embeddings().weight.detach()  # type: ignore[operator,no-any-return]


def learned_token(base: BaseModel, token: str, text: str) -> Embedding:
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


def test_a_token_encodes_like_the_rows_that_it_copies(base: BaseModel) -> None:
    token = learned_token(base, "zorb", "ab")
    before, unrelated = base.encode_text(["a zorb b"]).tensors, base.encode_text(["zorbs azorb"]).tensors
    with attach_embeddings(base, [token]):
        if base.family != "flux":  # T5 splits words differently than CLIP
            assert same(base, ["a zorb b"], ["a ab b"])
        assert same(base, ["a ZORB, b"], ["a zorb, b"])
        attached, others = base.encode_text(["a zorb b"]).tensors, base.encode_text(["zorbs azorb"]).tensors
    assert any(not torch.equal(value, before[name]) for name, value in attached.items())
    assert all(torch.equal(value, unrelated[name]) for name, value in others.items())
    after = base.encode_text(["a zorb b"]).tensors
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_the_rows_of_the_base_are_not_touched(base: BaseModel) -> None:
    parts = [part for part in base.modules if part.startswith("text_encoder")]
    before = {part: rows_of(base, part).clone() for part in parts}
    layers = {part: base.modules[part].get_input_embeddings() for part in parts}  # type: ignore[operator]
    with attach_embeddings(base, [learned_token(base, "zorb", "ab")], trainable=True) as attachment:
        conditioning = base.encode_text(["a zorb"])
        loss_terms = [value.square().sum() for value in conditioning.tensors.values() if value.requires_grad]
        torch.autograd.backward(torch.stack(loss_terms).sum())
        gradients = {name: value.grad for name, value in attachment.named_parameters()}
        assert gradients
        assert all(value is not None and value.abs().max() > 0 for value in gradients.values())
    assert all(torch.equal(before[part], rows_of(base, part)) for part in parts)
    assert all(base.modules[part].get_input_embeddings() is layer for part, layer in layers.items())  # type: ignore[operator]


def test_tokens_and_an_adapter_of_the_token_layer_combine(tmp_path: Path) -> None:
    base = load_base(str(write_untrained_base(tmp_path / "base", "small-sd")), device="cpu")
    adapter = create_adapter(base, "text_encoder.*.token_embedding", generator=torch.Generator().manual_seed(1))
    plain = base.encode_text(["a b"])["states"]
    with attach(base, adapter), attach_embeddings(base, [learned_token(base, "zorb", "ab")]):
        assert torch.equal(base.encode_text(["a b"])["states"], plain)
    assert torch.equal(base.encode_text(["a b"])["states"], plain)


def test_several_tokens_are_distinguished(base: BaseModel) -> None:
    one, two = learned_token(base, "zorb", "ab"), learned_token(base, "blix", "c")
    with attach_embeddings(base, [one, two]):
        both = base.encode_text(["a zorb blix"]).tensors
    with attach_embeddings(base, [two, one]):
        again = base.encode_text(["a zorb blix"]).tensors
        reordered = base.encode_text(["a blix zorb"]).tensors
    assert all(torch.equal(value, again[name]) for name, value in both.items())
    assert any(not torch.equal(value, reordered[name]) for name, value in both.items())


def test_the_end_of_a_text_after_a_token_is_found(tmp_path: Path) -> None:
    # CLIP's older configurations take the greatest id as the end of the text.
    base = load_base(str(write_untrained_base(tmp_path / "base", "small-sdxl")), device="cpu")
    base.modules["text_encoder_2"].config.eos_token_id = 2  # type: ignore[union-attr]
    parts = ["text_encoder", "text_encoder_2"]
    ids = base.tokenizer("ab", add_special_tokens=False)["input_ids"]  # type: ignore[attr-defined]
    token = Embedding("zorb", {part: rows_of(base, part)[ids] for part in parts})
    with attach_embeddings(base, [token]):
        assert same(base, ["a zorb c"], ["a ab c"])
        assert not same(base, ["a zorb c"], ["a ba c"])


def test_tokens_that_do_not_match_are_refused_and_leave_the_base_untouched(tmp_path: Path) -> None:
    base = load_base(str(write_untrained_base(tmp_path / "base", "small-sd")), device="cpu")
    fits = Embedding("zorb", {"text_encoder": torch.ones(1, 16)})
    invalid = [
        ([Embedding("zorb", {"text_encoder_2": torch.ones(1, 16)})], "no 'text_encoder_2'"),
        ([Embedding("zorb", {"text_encoder": torch.ones(1, 15)})], "15 wide"),
        ([fits, Embedding("Zorb", {"text_encoder": torch.ones(1, 16)})], "two adapters"),
    ]
    tokenizer = base.tokenizer  # type: ignore[attr-defined]
    for tokens, problem in invalid:
        with pytest.raises(AdapterError, match=problem):
            attach_embeddings(base, tokens)
        assert base.tokenizer is tokenizer  # type: ignore[attr-defined]
    with attach_embeddings(base, [fits]), pytest.raises(AdapterError, match="already"):
        attach_embeddings(base, [fits])


def test_images_are_generated_with_the_tokens_of_a_file(tmp_path: Path) -> None:
    folder = write_untrained_base(tmp_path / "base", "small-sd")
    base = load_base(str(folder), device="cpu")
    adapter = create_adapter(base, "attention", generator=torch.Generator().manual_seed(1))
    tokens = [Embedding("zorb", {"text_encoder": torch.full((2, 16), 3.0)})]
    write_adapter(tmp_path / "both.safetensors", adapter, embeddings=tokens)
    empty = Adapter({}, base.family, base.fingerprint)
    write_adapter(tmp_path / "word.safetensors", empty, embeddings=tokens, card=Card(title="zorb"))
    assert read_bundle(tmp_path / "word.safetensors").embeddings == tuple(tokens)

    def draw(*files: str) -> Tensor:
        pixels, _ = Drawer(str(folder)).draw(
            parse_prompt(" ".join(["a zorb", *(f"<lora:{file}>" for file in files)])),
            DrawSettings(seeds=[1], steps=2),
            files=[(tmp_path / file, file) for file in files],
            negative=parse_prompt(""),
        )
        return pixels

    plain, both, alone = draw(), draw("both.safetensors"), draw("word.safetensors")
    # The adapter has no effect: only the token changes the image, equally in both files.
    assert torch.equal(both, alone)
    assert not torch.equal(plain, both)
    with pytest.raises(AdapterError, match="two adapters"):
        draw("both.safetensors", "word.safetensors")


@pytest.mark.parametrize(("format_", "files"), [("kohya", 1), ("diffusers", 1)])
def test_tokens_without_modules_are_written_if_the_format_has_files_for_them(
    tmp_path: Path, format_: str, files: int
) -> None:
    tokens = [Embedding("zorb", {"text_encoder": torch.ones(2, 16)})]
    written = write_adapter(tmp_path / "out", Adapter({}, "sd"), format=format_, embeddings=tokens)
    assert len(written) == files
    assert read_embeddings(tmp_path / "out") == tokens
    with pytest.raises(AdapterError, match="no modules"):
        write_adapter(tmp_path / "out", Adapter({}, "sd"), format=format_)
