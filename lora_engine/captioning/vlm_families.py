"""The families of vision-language models: classes, prompts, and what `generate` takes.

None needs torchvision. `AutoProcessor` loads a video processor for Qwen-VL and SmolVLM, which exists for torchvision
only; for these, tokenizer and image processor are loaded apart, and the image tokens are written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from lora_engine.errors import BaseModelError

_INSTRUCTION = (
    "Describe this image in two or three plain sentences: pose, clothing, objects, setting, light, colors, point of "
    "view and style. Begin at once, without an introduction."
)
_TAGS = "List what this image shows as short tags separated by commas, without sentences and without an introduction."
_HINT = " These tags of the image are a hint: {tags}."


@dataclass(frozen=True)
class VlmParts:
    """The parts of a model that prepare its inputs.

    Attributes:
        config: The model's configuration.
        tokenizer: Its tokenizer.
        images: Its image processor.
        processor: Both, for families whose processor loads without torchvision; else None.
        system: System message of chat models; None means that of the model.
    """

    config: Any
    tokenizer: Any
    images: Any
    processor: Any
    system: str | None = None


Prepare = Callable[[VlmParts, Sequence[Image.Image], Sequence[str]], Mapping[str, Any]]


@dataclass(frozen=True)
class VlmFamily:
    """A family of models, one entry of `VLM_FAMILIES`.

    Attributes:
        title: Its name.
        model: Its class in transformers.
        prepare: Returns the arguments of `generate` for images and their prompts.
        prompts: Style -> prompt.
        hint: What is added to the prompt for a tagger's tags; empty for models that follow no instruction.
        has_processor: True if its processor loads without torchvision.
        padding: Side on which shorter prompts are padded; None means that prompts of a batch must be equal.
    """

    title: str
    model: str
    prepare: Prepare
    prompts: Mapping[str, str]
    hint: str = _HINT
    has_processor: bool = True
    padding: Literal["left", "right"] | None = "left"

    @property
    def follows_instructions(self) -> bool:
        """Returns True for chat models, which answer questions."""
        return bool(self.hint)


def find_vlm_family(config: Mapping[str, Any], where: str) -> VlmFamily:
    """Returns the family of a model.

    Args:
        config: The content of its `config.json`.
        where: The folder, for errors.

    Raises:
        BaseModelError: Its type is not supported.
    """
    name = str(config.get("model_type"))
    if name not in VLM_FAMILIES:
        raise BaseModelError(
            f"unknown captioner: model_type is {name[:80]!r}",
            where=where,
            allowed=", ".join(VLM_FAMILIES),
            remedy="choose a model of these families; for a tagger, set captioner.name to tagger",
        )
    return VLM_FAMILIES[name]


def _beginning(parts: VlmParts, images: Sequence[Image.Image], prompts: Sequence[str]) -> Mapping[str, Any]:
    texts = [*prompts] if any(prompts) else None
    return dict(parts.processor(images=[*images], text=texts, padding=True, return_tensors="pt"))


def _beginning_after_image(parts: VlmParts, images: Sequence[Image.Image], prompts: Sequence[str]) -> Mapping[str, Any]:
    return dict(parts.processor(images=[*images], text=[*prompts], padding=True, return_tensors="pt"))


def _after_image_token(parts: VlmParts, images: Sequence[Image.Image], prompts: Sequence[str]) -> Mapping[str, Any]:
    texts = [f"<image>{prompt}" for prompt in prompts]
    inputs = dict(parts.processor(images=[[image] for image in images], text=texts, padding=True, return_tensors="pt"))
    inputs.pop("labels", None)
    return inputs


def _chat(parts: VlmParts, images: Sequence[Image.Image], prompts: Sequence[str]) -> Mapping[str, Any]:
    texts = [_message(parts, prompt) for prompt in prompts]
    return dict(parts.processor(images=[[image] for image in images], text=texts, padding=True, return_tensors="pt"))


def _message(parts: VlmParts, prompt: str) -> str:
    """Returns the chat of an image and a prompt in the model's own template, or in LLaVA's if it has none."""
    token = getattr(parts.processor, "image_token", None) or "<image>"
    token = getattr(token, "content", token)
    template = getattr(parts.processor, "chat_template", None) or getattr(parts.tokenizer, "chat_template", None)
    system = [{"role": "system", "content": parts.system}] if parts.system else []
    # Templates take a list of parts, or (JoyCaption) plain text, with or without the image's token.
    contents = ([{"type": "image"}, {"type": "text", "text": prompt}], prompt, f"{token}\n{prompt}")
    for content in contents if template else ():
        is_list = isinstance(content, list)
        first = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in system] if is_list else system
        try:
            text = parts.tokenizer.apply_chat_template(
                [*first, {"role": "user", "content": content}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception:  # noqa: S112 (a template of the model may raise any error for contents of the other form)
            continue
        if str(text).count(token) == 1 and prompt in text and "'type':" not in text:
            return str(text)
    return (
        f"{parts.system} USER: {token}\n{prompt} ASSISTANT:" if parts.system else f"USER: {token}\n{prompt} ASSISTANT:"
    )


def _qwen(parts: VlmParts, images: Sequence[Image.Image], prompts: Sequence[str]) -> Mapping[str, Any]:
    pixels = parts.images(images=[*images], return_tensors="pt")
    merged = int(parts.images.merge_size) ** 2
    system = f"<|im_start|>system\n{parts.system}<|im_end|>\n" if parts.system else ""
    texts = [
        f"{system}<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * (int(grid.prod()) // merged)}<|vision_end|>"
        f"{prompt}<|im_end|>\n<|im_start|>assistant\n"
        for prompt, grid in zip(prompts, pixels["image_grid_thw"], strict=True)
    ]
    tokens = parts.tokenizer(texts, padding=True, return_tensors="pt")
    is_image = (tokens["input_ids"] == int(parts.config.image_token_id)).long()
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "mm_token_type_ids": is_image,
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


def _smolvlm(parts: VlmParts, images: Sequence[Image.Image], prompts: Sequence[str]) -> Mapping[str, Any]:
    # Without splitting, an image is one tile.
    side = int(parts.config.vision_config.image_size)
    pixels = parts.images(
        images=[[image.resize((side, side), Image.Resampling.LANCZOS)] for image in images],
        do_image_splitting=False,
        return_tensors="pt",
    )
    count = (side // int(parts.config.vision_config.patch_size) // int(parts.config.scale_factor)) ** 2
    image = f"<fake_token_around_image><global-img>{'<image>' * count}<fake_token_around_image>"
    system = f"System: {parts.system}<end_of_utterance>\n" if parts.system else ""
    texts = [f"<|im_start|>{system}User:{image}{prompt}<end_of_utterance>\nAssistant:" for prompt in prompts]
    tokens = parts.tokenizer(texts, padding=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], **pixels}


_CHAT = {"sentences": _INSTRUCTION, "tags": _TAGS}
_FLORENCE = {"sentences": "<DETAILED_CAPTION>", "tags": "<CAPTION>"}
_NOTHING = {"sentences": "", "tags": ""}
_PALIGEMMA = {"sentences": "caption en", "tags": "caption en"}

VLM_FAMILIES: Mapping[str, VlmFamily] = {
    "blip": VlmFamily("BLIP", "BlipForConditionalGeneration", _beginning, _NOTHING, "", padding=None),
    "blip-2": VlmFamily("BLIP-2", "Blip2ForConditionalGeneration", _beginning_after_image, _NOTHING, ""),
    "florence2": VlmFamily(
        "Florence-2", "Florence2ForConditionalGeneration", _beginning_after_image, _FLORENCE, "", padding="right"
    ),
    "qwen2_5_vl": VlmFamily("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", _qwen, _CHAT, has_processor=False),
    "qwen3_vl": VlmFamily("Qwen3-VL", "Qwen3VLForConditionalGeneration", _qwen, _CHAT, has_processor=False),
    "idefics3": VlmFamily("SmolVLM (Idefics3)", "Idefics3ForConditionalGeneration", _chat, _CHAT),
    "smolvlm": VlmFamily("SmolVLM2", "SmolVLMForConditionalGeneration", _smolvlm, _CHAT, has_processor=False),
    "llava": VlmFamily("LLaVA, JoyCaption", "LlavaForConditionalGeneration", _chat, _CHAT),
    "paligemma": VlmFamily("PaliGemma", "PaliGemmaForConditionalGeneration", _after_image_token, _PALIGEMMA, ""),
}
"""`model_type` in `config.json` -> family."""
