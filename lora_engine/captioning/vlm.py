"""Runs a vision-language model: loads it from safetensors without code of its own, and captions images in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lora_engine.bases.base import default_device
from lora_engine.building import BUILDING, align_weights, without_bars
from lora_engine.captioning.answers import answer_tokens, followed_by
from lora_engine.captioning.source import CaptionerModel
from lora_engine.captioning.vlm_families import VlmFamily, VlmParts, find_vlm_family
from lora_engine.data.captioner_options import MAX_DESCRIPTION, VlmOptions
from lora_engine.data.text_files import clean_text
from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.families.layout import find_weights

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GPU_BATCH = 8
_LOADING = (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
_ENDS = {"sentences": ".!?\u3002", "tags": ","}


class Vlm:
    """A loaded vision-language model.

    Args:
        model: The model, in evaluation mode.
        parts: What prepares its inputs.
        family: Its family.
        options: See `VlmOptions`.
    """

    def __init__(self, model: Any, parts: VlmParts, family: VlmFamily, options: VlmOptions) -> None:
        self._model, self._parts, self._options = model, parts, options
        self.family = family
        self.batch_size = options.batch_size or (1 if model.device.type == "cpu" else _GPU_BATCH)

    def plain(self, text: str) -> str:
        """Returns a text without the names of the model's special tokens, which would otherwise be read as such."""
        special = sorted(_special_tokens(self._parts.tokenizer), key=len, reverse=True)
        before = None
        while before != text:  # what is removed may have kept two halves of another name apart
            before = text
            for token in special:
                text = text.replace(token, " ")
        return " ".join(text.split())

    def close(self) -> None:
        """Frees the memory of the model; on a GPU for other processes too, such as that of a training."""
        device, self._model = self._model.device.type, None
        if device == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def describe(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """Returns one line per image, of at most `MAX_DESCRIPTION` characters; greedy or by beams, so without chance.

        Raises:
            BaseModelError: The model does not fit its processor, or the images do not fit in memory.
        """
        if self.family.padding is None and len(set(prompts)) > 1:
            pairs = zip(images, prompts, strict=True)
            return [text for image, prompt in pairs for text in self.describe([image], [prompt])]
        with self._explained("caption"):
            inputs = self._inputs(images, prompts)
            output = self._model.generate(**inputs, **self._settings())
        return [self._finish(row) for row in _generated(output, inputs.get("input_ids"))]

    @torch.inference_mode()
    def answer(self, image: Image.Image, question: str, answers: Sequence[str]) -> list[float]:
        """Returns the probability of each answer of one character to a question about an image; others have the rest.

        With and without a space before it, an answer is the same. Chat models only.

        Raises:
            BaseModelError: The model does not fit its processor, or its tokenizer splits an answer.
        """
        space, tokens = answer_tokens(self._parts.tokenizer, answers)
        with self._explained("answer"):
            inputs = followed_by(self._inputs([image], [question]), space)
            logits = self._model(**inputs, logits_to_keep=1 + len(space)).logits[0]
        after = logits.float().softmax(dim=-1).cpu()
        shares = [float(after[0, list(ids)].sum()) for ids in tokens]
        if space:
            before = float(after[0, space[0]])
            shares = [share + before * float(after[1, ids[0]]) for share, ids in zip(shares, tokens, strict=True)]
        return shares

    def _inputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
        reduced = [_reduce(image, self._options.resolution) for image in images]
        with BUILDING:  # its lazy imports are not thread-safe
            return self._to_device(self.family.prepare(self._parts, reduced, prompts))

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (*_LOADING, IndexError, AssertionError) as error:
            raise BaseModelError(
                f"the {self.family.title} model cannot {verb} ({_first_line(error)})",
                remedy="check prompt and files of the model; if memory is short, lower batch_size or resolution",
            ) from error

    def _settings(self) -> dict[str, Any]:
        options = self._options
        settings: dict[str, Any] = {
            "max_new_tokens": options.max_tokens,
            "num_beams": options.beams,
            "do_sample": False,
            # The configuration of a model may sample.
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if options.repetition_penalty != 1.0:
            settings["repetition_penalty"] = options.repetition_penalty
        if options.no_repeat_ngram:
            settings["no_repeat_ngram_size"] = options.no_repeat_ngram
        return settings

    def _to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        device, dtype = self._model.device, self._model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    def _finish(self, row: Tensor) -> str:
        text = clean_text(str(self._parts.tokenizer.decode(row, skip_special_tokens=True)))
        ends = self._model.generation_config.eos_token_id
        ids = {ends} if isinstance(ends, int) else set(ends or ())
        if len(row) >= self._options.max_tokens and not ids & set(row.tolist()):
            text = _to_last_end(text, _ENDS[self._options.style])
        return (
            text if len(text) <= MAX_DESCRIPTION else _to_last_end(text[:MAX_DESCRIPTION], _ENDS[self._options.style])
        )


def load_vlm(source: CaptionerModel, options: VlmOptions) -> Vlm:
    """Loads a vision-language model.

    Raises:
        BaseModelError: Its files are damaged, of an unknown type, or lack weights.
        SettingsError: This machine lacks the requested device.
    """
    where = str(source.folder)
    family = find_vlm_family(read_json_object(source.folder / "config.json", BaseModelError), where)
    device = _choose_device(options.device)
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cls = getattr(transformers, family.model)
    variant, _ = find_weights(source.folder, "model")
    try:
        # Building a model draws from the global generator; its state is restored.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars():
            model, loading = cls.from_pretrained(
                source.folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                variant=variant,
                dtype=_DTYPES[precision],
                output_loading_info=True,
            )
            parts = _load_parts(source, family, model.config, options)
    except _LOADING as error:
        raise BaseModelError(
            f"the captioner cannot be loaded ({_first_line(error)})",
            where=where,
            remedy="download or save the model again",
        ) from error
    _refuse_missing(loading, where)
    align_weights(model)
    return Vlm(model.eval().requires_grad_(False).to(device), parts, family, options)


def _load_parts(source: CaptionerModel, family: VlmFamily, config: Any, options: VlmOptions) -> VlmParts:
    local = {"local_files_only": True, "trust_remote_code": False}
    if family.has_processor:
        processor = transformers.AutoProcessor.from_pretrained(source.folder, **local)
        tokenizer, images = processor.tokenizer, processor.image_processor
    else:
        processor = None
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **local)
        images = transformers.AutoImageProcessor.from_pretrained(source.folder, backend="pil", **local)
    if family.padding is not None:
        tokenizer.padding_side = family.padding
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return VlmParts(config, tokenizer, images, processor, options.system)


def _refuse_missing(loading: Mapping[str, Any], where: str) -> None:
    # transformers would continue with random weights and only log a warning.
    missing = sorted({*loading["missing_keys"], *(str(key[0]) for key in loading["mismatched_keys"])})
    if missing:
        raise BaseModelError(
            f"{len(missing)} weights of the captioner are missing or of another shape, first {missing[0]}",
            where=where,
            remedy="download or save the model again",
        )


def _choose_device(device: str) -> str:
    available: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device in available and not available[device]():
        raise SettingsError(
            f"captioner.device is {device!r}, but torch finds no such device on this machine",
            remedy="set captioner.device to auto",
        )
    return default_device() if device == "auto" else device


def _generated(output: Tensor, prompt: Tensor | None) -> Iterable[Tensor]:
    """Returns the rows without the prompt; models whose decoder does not repeat it give none."""
    if prompt is not None and output.shape[1] >= prompt.shape[1] and torch.equal(output[:, : prompt.shape[1]], prompt):
        output = output[:, prompt.shape[1] :]
    return output.cpu()


def _special_tokens(tokenizer: Any) -> set[str]:
    added = {str(token) for token in tokenizer.get_added_vocab()}
    return {token for token in (*tokenizer.all_special_tokens, *added) if token.strip()}


def _to_last_end(text: str, ends: str) -> str:
    last = max(text.rfind(end) for end in ends)
    if last <= 0:
        return text
    return text[:last].rstrip() if ends == "," else text[: last + 1]


def _reduce(image: Image.Image, resolution: int) -> Image.Image:
    factor = math.sqrt(resolution**2 / (image.width * image.height))
    if factor >= 1:
        return image
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
