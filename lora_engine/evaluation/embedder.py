"""Embeds images and texts for the metrics: a CLIPModel from a local folder, with preprocessing in torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from lora_engine.building import BUILDING, align_weights, without_bars
from lora_engine.documents import read_json_object
from lora_engine.errors import SettingsError
from lora_engine.files import canonical_json, sha256_bytes, sha256_file

# OpenAI's values: the default for a folder whose preprocessor configuration has none.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGE_BATCH, _TEXT_BATCH = 32, 128


class Embedder:
    """An embedder of images and texts; vectors of different fingerprints are not comparable.

    Args:
        model: A transformers `CLIPModel`.
        tokenizer: Its tokenizer.
        name: Name for display.
        fingerprint: SHA-256 over the files that it was loaded from.
        mean: Mean per channel, for images in [0, 1].
        std: Standard deviation per channel.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        fingerprint: str,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
    ) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._size = int(model.config.vision_config.image_size)
        self._length = int(model.config.text_config.max_position_embeddings)
        self._mean = torch.tensor(mean).view(1, 3, 1, 1)
        self._std = torch.tensor(std).view(1, 3, 1, 1)

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embeds images [n, 3, height, width] in [-1, 1] as float32 [n, d] of length 1."""
        parts = [
            self._model.get_image_features(pixel_values=self._prepare(part)).pooler_output
            for part in torch.split(pixels, _IMAGE_BATCH)
        ]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as float32 [n, d] of length 1; a text longer than the model's context is truncated."""
        parts = []
        for start in range(0, len(texts), _TEXT_BATCH):
            tokens = self._tokenizer(
                list(texts[start : start + _TEXT_BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self._length,
                return_tensors="pt",
            )
            parts.append(self._model.get_text_features(**tokens).pooler_output)
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def _prepare(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self._size / min(height, width)
        if scale != 1:
            resized = [max(self._size, round(height * scale)), max(self._size, round(width * scale))]
            pixels = F.interpolate(pixels.float(), resized, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = (pixels.shape[-2] - self._size) // 2, (pixels.shape[-1] - self._size) // 2
        square = pixels[..., top : top + self._size, left : left + self._size]
        return (square.float() * 0.5 + 0.5 - self._mean) / self._std


def load_embedder(folder: str | Path | None = None) -> Embedder:
    """Loads the embedder of a local folder; None loads the one of the embedded base.

    Raises:
        SettingsError: The folder is missing or has no CLIPModel with weights and tokenizer.
    """
    if folder is None:
        from lora_engine.bases.tiny import folder as tiny_folder

        return _load(tiny_folder() / "clip", "tiny/clip")
    path = Path(folder)
    return _load(path, path.resolve().name)


def _load(path: Path, name: str) -> Embedder:
    config = _read_json(path / "config.json")
    if config is None or config.get("model_type") != "clip":
        raise SettingsError(
            "is not an embedder: it has no config.json of a CLIPModel",
            where=str(path),
            remedy="give a local folder that CLIPModel.save_pretrained wrote, with its tokenizer",
        )
    try:
        # Building a model draws from the global generator; its state is restored.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars():
            model, loading = CLIPModel.from_pretrained(
                path, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SettingsError(f"the embedder cannot be loaded ({error})", where=str(path)) from None
    # transformers would continue with random weights and only log a warning.
    if missing := sorted(loading["missing_keys"]):
        raise SettingsError(f"{len(missing)} weights of the embedder are missing, first {missing[0]}", where=str(path))
    align_weights(model)
    preparation = _read_json(path / "preprocessor_config.json") or {}
    return Embedder(
        model,
        tokenizer,
        name=name,
        fingerprint=_fingerprint(path),
        mean=preparation.get("image_mean", _MEAN),
        std=preparation.get("image_std", _STD),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None if it is missing."""
    try:
        content: dict[str, Any] = read_json_object(path, SettingsError)
    except FileNotFoundError:
        return None
    return content


def _fingerprint(path: Path) -> str:
    files = sorted(file for file in path.iterdir() if file.suffix in {".safetensors", ".json", ".txt"})
    return sha256_bytes(canonical_json([[file.name, sha256_file(file)] for file in files]))
