"""Runs a tagger of the WD family with onnxruntime, an optional package; no timm and no torchvision.

The images are prepared as in SmilingWolf's taggers: padded with white to a square, BGR, 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_engine.captioning.source import TAGGER_FILES, CaptionerModel
from lora_engine.data.captioner_options import TaggerOptions
from lora_engine.data.editing import to_spaces
from lora_engine.data.text_files import clean_text
from lora_engine.documents.csv_source import read_table
from lora_engine.errors import BaseModelError, SettingsError

_GENERAL, _CHARACTER, _RATING = "0", "4", "9"
_CATEGORIES = (_GENERAL, _CHARACTER, _RATING)
_MAX_TABLE = 16 << 20
_MAX_SIDE = 4096


class Tagger:
    """A loaded tagger.

    Args:
        session: The session of onnxruntime.
        tags: Name and category of each output.
        options: See `TaggerOptions`.
    """

    batch_size = 1

    def __init__(self, session: Any, tags: Sequence[tuple[str, str]], options: TaggerOptions) -> None:
        self._session, self._options = session, options
        self._names = [to_spaces(clean_text(name)) for name, _ in tags]
        self._categories = np.array([category for _, category in tags])
        self._input = session.get_inputs()[0]
        self._side = int(self._input.shape[1])

    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """Returns the tags of each image, separated by commas: characters, general tags by probability, the rating.

        Raises:
            BaseModelError: The model does not fit its table of tags.
        """
        return [", ".join(self._tags(image)) for image in images]

    def _tags(self, image: Image.Image) -> list[str]:
        try:
            (output,) = self._session.run(None, {self._input.name: _prepare(image, self._side)})
        except Exception as error:  # onnxruntime has no common class for its errors
            raise BaseModelError(f"the tagger cannot tag ({str(error)[:200]})") from error
        values = np.asarray(output, dtype=np.float64).reshape(-1)
        if len(values) != len(self._names):
            raise BaseModelError(
                f"the tagger gives {len(values)} values, and selected_tags.csv has {len(self._names)} tags",
                remedy="download both files of one revision again",
            )
        options = self._options
        chosen = self._above(values, _CHARACTER, options.character) + self._above(values, _GENERAL, options.general)
        chosen = sorted(sorted(chosen, key=lambda index: -values[index])[: options.max_tags], key=chosen.index)
        if options.rating and (ratings := np.flatnonzero(self._categories == _RATING)).size:
            chosen.append(int(ratings[values[ratings].argmax()]))
        return [self._names[index] for index in chosen]

    def _above(self, values: NDArray[np.float64], category: str, threshold: float) -> list[int]:
        indices = np.flatnonzero((self._categories == category) & (values > threshold))
        return sorted((int(index) for index in indices), key=lambda index: -values[index])


def load_tagger(source: CaptionerModel, options: TaggerOptions) -> Tagger:
    """Loads a tagger.

    Raises:
        BaseModelError: A file is damaged.
        SettingsError: onnxruntime is not installed, or supports no GPU although one is requested.
    """
    try:
        import onnxruntime
    except ImportError:
        raise SettingsError(
            "taggers need onnxruntime, which is not installed",
            remedy="pip install 'loraline[taggers]', or use a vision-language model (captioner vlm)",
        ) from None
    model, table = (source.folder / name for name in TAGGER_FILES)
    if table.stat().st_size > _MAX_TABLE:
        raise BaseModelError("is too large", where=str(table), allowed=f"at most {_MAX_TABLE >> 20} MiB")
    rows = read_table(table.read_bytes(), str(table), ("name", "category"), BaseModelError)
    tags = [(row.cells["name"], row.cells["category"].strip()) for row in rows]
    if not any(category in _CATEGORIES for _, category in tags):
        raise BaseModelError(
            "names no tags", where=str(table), allowed="rows with category 0 (general), 4 (character) or 9 (rating)"
        )
    providers = _providers(onnxruntime.get_available_providers(), options.device)
    try:
        # From bytes: a model that is read by its path may name further files to read.
        session = onnxruntime.InferenceSession(model.read_bytes(), providers=providers)
    except Exception as error:
        raise BaseModelError(f"the tagger cannot be loaded ({str(error)[:200]})", where=str(model)) from error
    shape = session.get_inputs()[0].shape
    if len(shape) != 4 or not isinstance(shape[1], int) or not 1 <= shape[1] <= _MAX_SIDE or shape[3] != 3:
        raise BaseModelError(f"the input has the shape {shape}", where=str(model), allowed="[n, side, side, 3]")
    return Tagger(session, tags, options)


def _providers(available: Sequence[str], device: str) -> list[str]:
    gpu = "CUDAExecutionProvider"
    if device == "cuda" and gpu not in available:
        raise SettingsError(
            "the tagger's device is 'cuda', but onnxruntime supports no GPU here",
            remedy="install onnxruntime-gpu, or set device to auto",
        )
    return [*([gpu] if device != "cpu" and gpu in available else []), "CPUExecutionProvider"]


def _prepare(image: Image.Image, side: int) -> NDArray[np.float32]:
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(pixels[None, :, :, ::-1])
