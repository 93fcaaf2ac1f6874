"""Marks parts of images with models: what a text describes (CLIPSeg), or everything but the background."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoTokenizer,
    CLIPSegForImageSegmentation,
)

from lora_engine.data.models import load_part, load_vision_model
from lora_engine.data.preparation_spec import BackgroundMask, TextMask
from lora_engine.errors import SettingsError


class TextMasker:
    """Marks what a text describes.

    Args:
        options: See `TextMask`; the model is a folder.
        label: Name of the model for records.

    Raises:
        SettingsError: The model cannot be loaded.
    """

    def __init__(self, options: TextMask, label: str) -> None:
        self._model = load_vision_model(CLIPSegForImageSegmentation, options.model, "clipseg")
        self._processor = load_part(AutoImageProcessor, options.model, backend="pil")
        tokenizer = load_part(AutoTokenizer, options.model)
        self._tokens = tokenizer([options.prompt], truncation=True, return_tensors="pt")
        self._options = options
        self.label = f"text {options.prompt!r} ({label})"

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns a mask of the size of an RGB image: 255 where the probability exceeds the threshold, else 0."""
        logits = self._model(**_prepare(self._processor, image), **self._tokens).logits
        probability = torch.sigmoid(logits.float()).reshape(1, 1, *logits.shape[-2:])
        radius = min(self._options.smooth, *(side - 1 for side in logits.shape[-2:]))
        if radius:
            padded = F.pad(probability, (radius,) * 4, mode="replicate")
            probability = F.avg_pool2d(padded, 2 * radius + 1, stride=1)
        return _to_mask(probability, image, self._options.threshold)


class BackgroundMasker:
    """Marks everything but the background.

    Args:
        options: See `BackgroundMask`; the model is a folder.
        label: Name of the model for records.

    Raises:
        SettingsError: The model cannot be loaded, or has none of the labels.
    """

    def __init__(self, options: BackgroundMask, label: str) -> None:
        self._model = load_vision_model(AutoModelForSemanticSegmentation, options.model)
        self._processor = load_part(AutoImageProcessor, options.model, backend="pil")
        labels = {index: str(label).casefold() for index, label in self._model.config.id2label.items()}
        wanted = {label.casefold() for label in options.labels}
        if unknown := sorted(wanted - set(labels.values())):
            known = ", ".join(sorted(labels.values())[:100])
            raise SettingsError(
                f"the model has no label {unknown[0]!r}",
                where=options.model,
                allowed=known,
                remedy="set labels to those of the background",
            )
        self._background = [int(index) for index, label in labels.items() if label in wanted]
        self._threshold = options.threshold
        self.label = f"background ({label})"

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns a mask of the size of an RGB image: 0 where the background is likelier than 1 - threshold."""
        logits = self._model(**_prepare(self._processor, image)).logits.float()
        foreground = 1.0 - torch.softmax(logits, dim=1)[:, self._background].sum(dim=1, keepdim=True)
        return _to_mask(foreground, image, self._threshold)


def _prepare(processor: object, image: Image.Image) -> dict[str, Tensor]:
    return {"pixel_values": processor(images=image, return_tensors="pt")["pixel_values"]}  # type: ignore[operator]


def _to_mask(probability: Tensor, image: Image.Image, threshold: float) -> Image.Image:
    size = (image.height, image.width)
    enlarged = F.interpolate(probability, size, mode="bilinear", align_corners=False)[0, 0]
    return Image.fromarray((enlarged > threshold).numpy().astype(np.uint8) * np.uint8(255))
