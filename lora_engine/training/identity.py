"""Identity preservation: pulls the embedding of the decoded prediction towards that of the user's images.

The embedder is any image model that transformers can load from a local folder: a face network, DINO, CLIP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.noise import NoiseSchedule
from lora_engine.building import BUILDING, align_weights, without_bars
from lora_engine.data.pixels import read_pixels
from lora_engine.documents import read_json_object
from lora_engine.errors import SettingsError
from lora_engine.training.batches import Batch
from lora_engine.training.examples import Example
from lora_engine.training.objective import noisy_and_target
from lora_engine.training.specs.methods import Identity

# OpenAI's values for CLIP, the defaults of folders without preprocessor_config.json.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class SubjectEmbedder:
    """Unit embeddings of images, differentiable in the pixels.

    Args:
        model: A transformers model, frozen: CLIP's vision tower, or any model with a pooled output.
        side: Side of the model's square input; pixels.
        mean: Mean per channel, of images in [0, 1].
        std: Deviation per channel.
    """

    def __init__(self, model: Any, side: int, mean: Iterable[float] = _MEAN, std: Iterable[float] = _STD) -> None:
        self._model, self._side = model.eval().requires_grad_(False), side
        self._mean = torch.tensor(list(mean)).view(1, 3, 1, 1)
        self._std = torch.tensor(list(std)).view(1, 3, 1, 1)

    def to(self, device: torch.device) -> SubjectEmbedder:
        """Moves the embedder to a device; returns itself."""
        self._model = self._model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns embeddings, float32 [n, d] of length 1, of images [n, 3, height, width] in [-1, 1]; keeps the graph.

        Resizes each image to the square without cropping, so that nothing of the subject is lost.
        """
        values = F.interpolate(pixels.float(), (self._side, self._side), mode="bilinear", antialias=True)
        values = (values * 0.5 + 0.5 - self._mean) / self._std
        output = self._model.get_image_features if hasattr(self._model, "get_image_features") else self._model
        return F.normalize(_pooled(output(pixel_values=values)).float(), dim=-1)


def load_subject_embedder(folder: Path | None = None) -> SubjectEmbedder:
    """Loads the embedder of a local folder; None loads the embedded base's CLIP.

    Raises:
        SettingsError: The folder holds no image model with weights that transformers can load.
    """
    from transformers import AutoModel

    if folder is None:
        from lora_engine.bases.tiny import folder as tiny_folder

        folder = tiny_folder() / "clip"
    try:
        # Building a model draws from the global generator, whose state is restored.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars():
            model, loading = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SettingsError(
            f"the embedder cannot be loaded ({error})",
            where=str(folder),
            allowed="a local folder with config.json and model.safetensors of an image model",
            remedy="save the model with save_pretrained, or leave embedder out",
        ) from None
    if missing := sorted(loading["missing_keys"]):
        # transformers would continue with random weights and only log a warning.
        problem = f"{len(missing)} weights of the embedder are missing, first {missing[0]}"
        raise SettingsError(problem, where=str(folder))
    config = getattr(model.config, "vision_config", model.config)
    side = getattr(config, "image_size", None)
    if not isinstance(side, int):
        raise SettingsError(
            "the embedder has no image_size in its configuration",
            where=str(folder / "config.json"),
            allowed="a model whose config.json has image_size",
        )
    align_weights(model)
    preprocessor = _preprocessor_config(folder)
    return SubjectEmbedder(model, side, preprocessor.get("image_mean", _MEAN), preprocessor.get("image_std", _STD))


@dataclass(frozen=True)
class IdentityLoss:
    """Distance of the decoded prediction from the user's images in the embedder's space.

    Attributes:
        base: Base that decodes; the gradient passes through its decoder.
        embedder: Embedder of the decoded images.
        reference: float32 [d] of length 1: the mean embedding of the user's images.
        settings: See `Identity`.
    """

    base: BaseModel
    embedder: SubjectEmbedder
    reference: Tensor
    settings: Identity
    name: str = "identity"

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Returns the weight times the mean of 1 - cosine over the rows with little noise; 0 without such rows."""
        del target
        early = batch.timesteps[: batch.instances] < self.settings.until * self.base.noise.timesteps
        rows = torch.nonzero(early).flatten()
        if not len(rows):
            # A zero with a graph, so that backward works for every batch.
            return predicted[:0].sum()
        noisy, _ = noisy_and_target(self.base.noise, batch)
        clean = predicted_clean(self.base.noise, noisy[rows], predicted[rows], batch.timesteps[rows])
        pixels = center_crop(self.base.decode_latents(clean), self.settings.crop)
        similarity = self.embedder(pixels.clamp(-1.5, 1.5)) @ self.reference
        # Divided by all of the user's rows, so that a batch with one early row weighs less than a batch full of them.
        return self.settings.weight * (1.0 - similarity).sum() / batch.instances


def identity_loss(
    base: BaseModel, settings: Identity, examples: Iterable[Example], folder: Path | None
) -> IdentityLoss:
    """Returns the loss, with the mean embedding of the examples as its reference.

    Raises:
        SettingsError: The embedder cannot be loaded.
    """
    embedder = load_subject_embedder(folder).to(base.device)
    with torch.no_grad():
        # One image at a time: sizes differ, and other batch rows could change the last bits.
        embeddings = [
            embedder(center_crop(read_pixels(example.file)[None].to(base.device), settings.crop))[0]
            for example in examples
        ]
    return IdentityLoss(base, embedder, F.normalize(torch.stack(embeddings).mean(dim=0), dim=0), settings)


def predicted_clean(schedule: NoiseSchedule, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
    """Returns the clean latents implied by a prediction of any parameterization, in the shape of `noisy`.

    Noisy latents and targets are linear in image and noise, x_t = a x0 + b e and y = c x0 + d e. So
    x0 = (d x_t - b y) / (a d - b c). The result is undefined for noise prediction at timesteps without signal.
    """
    ones = torch.ones(len(timesteps), *[1] * (noisy.dim() - 1), device=noisy.device)
    zeros = torch.zeros_like(ones)
    a, b = schedule.add_noise(ones, zeros, timesteps), schedule.add_noise(zeros, ones, timesteps)
    c, d = schedule.target(ones, zeros, timesteps), schedule.target(zeros, ones, timesteps)
    return (d * noisy - b * predicted) / (a * d - b * c)


def center_crop(pixels: Tensor, share: float) -> Tensor:
    """Returns the center of images [n, 3, height, width]: that share of both sides, at least one pixel."""
    height, width = (max(1, round(side * share)) for side in pixels.shape[-2:])
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _pooled(output: Any) -> Tensor:
    features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if features is None:
        # Models without a pooled output: the mean over positions, which form a grid (CNN) or a sequence (ViT).
        states = output.last_hidden_state
        features = states.mean(dim=(2, 3)) if states.dim() == 4 else states.mean(dim=1)
    pooled: Tensor = features.flatten(1)
    return pooled


def _preprocessor_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = read_json_object(folder / "preprocessor_config.json", SettingsError)
    except FileNotFoundError:
        return {}
    return config
