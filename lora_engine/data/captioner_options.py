"""Defines the options of the captioners that look at images. Must not import torch."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lora_engine.data.manifest import MAX_CAPTION

PROMPT_WORDS = ("trigger", "class_word", "tags", "caption")
"""The placeholders of a prompt."""
RESERVED = 700
"""Characters of a caption that models leave for the filled template."""
MAX_DESCRIPTION = MAX_CAPTION - RESERVED
"""Most characters of a caption by a model."""
ModelName = Annotated[str, Field(min_length=1, max_length=1000)]
_Threshold = Annotated[float, Field(ge=0.0, le=1.0)]


class TaggerOptions(BaseModel):
    """A tagger: a model of the WD family (WaifuDiffusion), which lists tags with probabilities.

    Attributes:
        model: A folder with `model.onnx` and `selected_tags.csv`, or a hub id, optionally with `@revision`.
        general: Lowest probability of a general tag.
        character: Lowest probability of a character's name; 1 takes none.
        rating: True adds the most probable rating.
        max_tags: Most tags per image; the most probable ones stay.
        device: Where it runs; `auto` is a GPU if onnxruntime supports one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["tagger"] = "tagger"
    model: ModelName
    general: _Threshold = 0.35
    character: _Threshold = 0.85
    rating: bool = False
    max_tags: int = Field(default=40, ge=1, le=500)
    device: Literal["auto", "cpu", "cuda"] = "auto"


class VlmOptions(BaseModel):
    """A vision-language model: BLIP, BLIP-2, Florence-2, Qwen-VL, SmolVLM, LLaVA (JoyCaption) or PaliGemma.

    Attributes:
        model: A folder that `save_pretrained` of transformers wrote, or a hub id, optionally with `@revision`.
        prompt: The instruction, task (`<DETAILED_CAPTION>` of Florence-2) or beginning of the caption (BLIP). May have
            `{trigger}`, `{class_word}`, `{tags}` (of `tagger`) and `{caption}` (the existing one). None means that of
            the model's family for `style`.
        system: System message of chat models; None means that of the model.
        style: Sentences, or tags separated by commas; chooses the prompt.
        tagger: A tagger whose tags the prompt gives as a hint; None means none.
        max_tokens: Most tokens of a caption; a caption that reaches it ends with its last full sentence or tag.
        beams: Number of beams; 1 is greedy. Nothing is drawn at random.
        repetition_penalty: Factor against words that occurred; above 1 avoids loops.
        no_repeat_ngram: Length of word sequences (in tokens) that may not occur twice; 0 allows all.
        resolution: Images of more than this number of pixels squared are reduced before the model reads them.
        batch_size: Images at a time; None means 1 on a CPU, where the result then depends on the image alone, and 8 on
            a GPU.
        device: Where it runs; `auto` is the fastest.
        precision: Dtype of the weights; `auto` is bf16 on a GPU and fp32 on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["vlm"] = "vlm"
    model: ModelName
    prompt: str | None = Field(default=None, max_length=2000)
    system: str | None = Field(default=None, max_length=2000)
    style: Literal["sentences", "tags"] = "sentences"
    tagger: TaggerOptions | None = None
    max_tokens: int = Field(default=128, ge=1, le=1024)
    beams: int = Field(default=1, ge=1, le=8)
    repetition_penalty: float = Field(default=1.0, ge=1.0, le=2.0)
    no_repeat_ngram: int = Field(default=0, ge=0, le=16)
    resolution: int = Field(default=768, ge=64, le=4096)
    batch_size: int | None = Field(default=None, ge=1, le=256)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @field_validator("prompt")
    @classmethod
    def _prompt_is_plain(cls, value: str | None) -> str | None:
        try:
            parts = list(string.Formatter().parse(value or ""))
        except ValueError as error:
            raise ValueError(f"prompt {value!r} is not well formed: {error}") from None
        for _, name, specification, conversion in parts:
            if name is not None and (name not in PROMPT_WORDS or specification or conversion):
                allowed = ", ".join(f"{{{word}}}" for word in PROMPT_WORDS)
                raise ValueError(f"prompt {value!r} may hold {allowed} only, not {{{name}}}")
        return value


def fill_prompt(prompt: str, words: Mapping[str, str]) -> str:
    """Returns a prompt with its placeholders filled in; values with braces stay text."""
    text = prompt.format(**{word: words.get(word, "") for word in PROMPT_WORDS})
    return "\n".join(" ".join(line.split()) for line in text.splitlines())
