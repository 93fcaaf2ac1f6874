"""Embeds images and texts for the metrics, with the models and the preprocessing of transformers."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from lora_engine.bases.source import TINY
from lora_engine.building import BUILDING, align_weights, without_bars
from lora_engine.data.pixels import to_image
from lora_engine.embedding.embedder_source import (
    EMBEDDER_TYPES,
    EmbedderSource,
    read_configuration,
    resolve_embedder,
)
from lora_engine.errors import SettingsError

_IMAGE_BATCH, _TEXT_BATCH = 32, 128


class Embedder:
    """An embedder of images, and of texts if it has a tokenizer; vectors of different fingerprints are not comparable.

    Args:
        model: The model.
        processor: Its image processor for Pillow.
        tokenizer: Its tokenizer; None for a model that embeds images only.
        name: Name for display.
        fingerprint: SHA-256 over the files that it was loaded from.
    """

    def __init__(self, model: Any, processor: Any, tokenizer: Any, *, name: str, fingerprint: str) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._model = model.eval().requires_grad_(False)
        self._processor, self._tokenizer = processor, tokenizer
        text = getattr(model.config, "text_config", None)
        self.max_tokens = int(text.max_position_embeddings) if text is not None else 0

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embeds images [n, 3, height, width] in [-1, 1], with 8 bits per channel, as float32 [n, d] of length 1."""
        parts = []
        for part in torch.split(pixels, _IMAGE_BATCH):
            inputs = self._processor([to_image(image) for image in part], return_tensors="pt")
            parts.append(self._image_features(inputs).float())
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as float32 [n, d] of length 1; a text longer than the model's context is truncated.

        Raises:
            SettingsError: The model embeds images only.
        """
        parts = []
        for start in range(0, len(texts), _TEXT_BATCH):
            tokens = self._tokenize(
                texts[start : start + _TEXT_BATCH],
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            if self._model.config.model_type != "clip":
                tokens = {"input_ids": tokens["input_ids"]}  # SigLIP was trained without masks of the padding
            parts.append(_pooled(self._model.get_text_features(**tokens)))
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def find_truncated(self, texts: Sequence[str]) -> list[str]:
        """Returns the texts that are longer than the model's context."""
        return [text for text in texts if len(self._tokenize([text])["input_ids"][0]) > self.max_tokens]

    def find_unreadable(self, texts: Sequence[str]) -> list[str]:
        """Returns the texts with letters of other scripts than Latin, if the model is a CLIP: it learned English."""
        return [text for text in texts if _has_other_script(text)] if self._model.config.model_type == "clip" else []

    def _tokenize(self, texts: Sequence[str], **options: Any) -> Mapping[str, Any]:
        if self._tokenizer is None:
            raise SettingsError(f"the embedder {self.name!r} embeds no texts", remedy="use a CLIP or a SigLIP")
        if self._model.config.model_type != "clip":
            texts = [text.lower() for text in texts]  # SigLIP was trained on lower case
        tokens: Mapping[str, Any] = self._tokenizer(list(texts), **options)
        return tokens

    def _image_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._tokenizer is None:
            return _pooled(self._model(**inputs))
        return _pooled(self._model.get_image_features(**inputs))


def load_embedder(source: EmbedderSource | str | Path | None = None) -> Embedder:
    """Loads an embedder; None loads the one of the embedded base. Names: see `resolve_embedder`.

    Raises:
        SettingsError: There is no such embedder, or its weights, tokenizer or preprocessing cannot be used.
    """
    if not isinstance(source, EmbedderSource):
        source = resolve_embedder(TINY if source is None else str(source))
    kind, folder = EMBEDDER_TYPES[source.model_type], source.folder
    try:
        # Building a model draws from the global generator; its state is restored.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars():
            model, loading = getattr(transformers, kind.model).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if kind.reads_text else None
            processor = _load_processor(source, model.config)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"the embedder cannot be loaded ({error})", where=str(folder)) from None
    # transformers would continue with random weights and only log a warning.
    if missing := sorted(loading["missing_keys"]):
        raise SettingsError(
            f"{len(missing)} weights of the embedder are missing, first {missing[0]}", where=str(folder)
        )
    align_weights(model)
    return Embedder(model, processor, tokenizer, name=source.label, fingerprint=source.fingerprint())


def _load_processor(source: EmbedderSource, config: Any) -> Any:
    """Returns the processor of the folder's configuration; what it lacks is that of the model's type and size."""
    settings = read_configuration(source.folder / "preprocessor_config.json") or {}
    known = {key: value for key, value in settings.items() if key not in ("image_processor_type", "processor_class")}
    side = getattr(getattr(config, "vision_config", config), "image_size", None)
    if source.model_type == "clip" and "crop_size" not in known and side:
        # Without a crop, as written by hand: CLIP's own policy at the model's size.
        known |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    elif source.model_type == "siglip" and "size" not in known and side:
        known |= {"size": {"height": side, "width": side}}
    return getattr(transformers, EMBEDDER_TYPES[source.model_type].processor)(**known)


def _has_other_script(text: str) -> bool:
    return any(letter.isalpha() and not unicodedata.name(letter, "").startswith("LATIN") for letter in text)


def _pooled(output: Any) -> Tensor:
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled
