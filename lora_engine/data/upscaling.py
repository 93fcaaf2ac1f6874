"""Enlarges images with a model, in tiles, so that memory does not grow with the image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import Swin2SRForImageSuperResolution

from lora_engine.data.models import load_vision_model
from lora_engine.data.preparation_spec import Swin2SR
from lora_engine.errors import SettingsError

_TILE, _OVERLAP = 192, 16


class Upscaler:
    """Enlarges RGB images by the factor of a model.

    Args:
        options: See `Swin2SR`; the model is a folder.
        label: Name of the model for records.

    Raises:
        SettingsError: The model cannot be loaded.
    """

    def __init__(self, options: Swin2SR, label: str) -> None:
        self._model = load_vision_model(Swin2SRForImageSuperResolution, options.model, "swin2sr")
        self.factor = int(self._model.config.upscale)
        if self.factor < 2:
            raise SettingsError(f"enlarges by a factor of {self.factor}", where=options.model, allowed="2 and more")
        self.label = f"swin2sr ({label})"

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the image, enlarged by `factor`; each tile sees 16 pixels of its neighbors."""
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0).permute(2, 0, 1)
        height, width = pixels.shape[1:]
        result = np.empty((height * self.factor, width * self.factor, 3), dtype=np.uint8)
        for top in range(0, height, _TILE):
            for left in range(0, width, _TILE):
                bottom, right = min(top + _TILE, height), min(left + _TILE, width)
                outer_top, outer_left = max(0, top - _OVERLAP), max(0, left - _OVERLAP)
                outer = pixels[:, outer_top : bottom + _OVERLAP, outer_left : right + _OVERLAP]
                rows = slice((top - outer_top) * self.factor, (bottom - outer_top) * self.factor)
                columns = slice((left - outer_left) * self.factor, (right - outer_left) * self.factor)
                result[top * self.factor : bottom * self.factor, left * self.factor : right * self.factor] = (
                    self._enlarge(outer)[rows, columns]
                )
        return Image.fromarray(result)

    @torch.inference_mode()
    def _enlarge(self, pixels: Tensor) -> NDArray[np.uint8]:
        """Returns a tile [3, height, width] in [0, 1] enlarged, as uint8 [height, width, 3]."""
        height, width = pixels.shape[1:]
        window = int(self._model.config.window_size)
        # The model needs whole windows.
        padded = F.pad(pixels[None], (0, -width % window, 0, -height % window), mode="replicate")
        enlarged = self._model(pixel_values=padded).reconstruction[0]
        values = enlarged[:, : height * self.factor, : width * self.factor].clamp(0.0, 1.0) * 255.0
        result: NDArray[np.uint8] = values.round().to(torch.uint8).permute(1, 2, 0).numpy()
        return result
