"""Chat models give probabilities of short answers, as their own `generate` has them, with or without a space before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_engine.captioning.answers import answer_tokens, followed_by
from lora_engine.captioning.source import resolve_judge
from lora_engine.captioning.vlm import load_vlm
from lora_engine.captioning.vlm_families import VLM_FAMILIES
from lora_engine.data.captioner_options import VlmOptions
from lora_engine.errors import BaseModelError
from tests.support.untrained_captioners import BUILDERS

CHAT = [name for name in BUILDERS if VLM_FAMILIES[name].follows_instructions]
QUESTION = "Is it a star? Answer with one digit."


def tokenizer_of(texts: Sequence[str], words: Any, alphabet: Sequence[str], size: int = 600) -> Any:
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = words
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>"], initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_an_answer_is_found_with_its_space_as_one_token_as_two_and_always() -> None:
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merged = tokenizer_of(["x 1 x 2 x 1 x 2"] * 9, pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet)
    space, tokens = answer_tokens(merged, "12")
    assert space == []
    assert [merged.convert_ids_to_tokens(ids) for ids in tokens] == [["1", "\u01201"], ["2", "\u01202"]]
    apart = tokenizer_of(["x"], pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet, 258)
    space, tokens = answer_tokens(apart, "12")
    assert apart.convert_ids_to_tokens(space) == ["\u0120"]
    assert [apart.convert_ids_to_tokens(ids) for ids in tokens] == [["1"], ["2"]]
    always = tokenizer_of(["x"], pre_tokenizers.Metaspace(prepend_scheme="first"), "\u258112")
    assert len(always("1", add_special_tokens=False)["input_ids"]) == 2
    space, tokens = answer_tokens(always, "12")
    assert always.convert_ids_to_tokens(space) == ["\u2581"]
    assert [always.convert_ids_to_tokens(ids) for ids in tokens] == [["1"], ["2"]]


def test_a_tokenizer_that_cannot_tell_the_answers_apart_is_refused() -> None:
    from tokenizers import pre_tokenizers

    unknown = tokenizer_of(["x"], pre_tokenizers.Whitespace(), "x")
    with pytest.raises(BaseModelError, match="does not tell the answers 1, 2 apart"):
        answer_tokens(unknown, "12")


@pytest.mark.parametrize("family", CHAT)
def test_the_probability_of_an_answer_is_that_of_generate(
    family: str, captioners: dict[str, Path], shown: list[Image.Image]
) -> None:
    model = load_vlm(resolve_judge(captioners[family]), VlmOptions(model="x"))
    space, tokens = answer_tokens(model._parts.tokenizer, "15")

    def after(*following: int) -> torch.Tensor:
        inputs = followed_by(model._inputs(shown[:1], [QUESTION]), following)
        options = {"max_new_tokens": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode():
            output = model._model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        return torch.softmax(output.logits[0][0].float(), dim=-1)

    first, second = after(), after(*space)
    expected = [
        sum(float(first[token]) for token in ids) + float(first[space[0]]) * float(second[ids[0]]) for ids in tokens
    ]
    answers = model.answer(shown[0], QUESTION, "15")
    assert answers == pytest.approx(expected, rel=1e-4)
    assert answers != pytest.approx(model.answer(shown[1], QUESTION, "15"), rel=1e-6), "the image has no effect"


@pytest.mark.parametrize("family", ["blip", "florence2", "paligemma"])
def test_a_model_that_answers_no_questions_is_no_judge(family: str, captioners: dict[str, Path]) -> None:
    with pytest.raises(BaseModelError, match=f"a model of the type '{family}' answers no questions.*qwen2_5_vl"):
        resolve_judge(captioners[family])


def test_a_folder_without_weights_and_one_that_does_not_exist_are_no_judge(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match=r"there is no config\.json"):
        resolve_judge(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(BaseModelError, match=r"weights|safetensors"):
        resolve_judge(tmp_path / "empty")
    with pytest.raises(BaseModelError, match="unknown judge '/nowhere': neither a folder nor a hub id"):
        resolve_judge("/nowhere")
