"""Identity preservation: the decoded prediction is to be embedded where the person's pictures are.

The embedder is any image model that transformers can load from a local folder: a face network, DINO, CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.components import align_weights, without_bars
from lora_engine.bases.noise import NoiseSchedule
from lora_engine.bases.one_at_a_time import BUILDING
from lora_engine.data.pixels import read_pixels
from lora_engine.errors import SettingsError
from lora_engine.training.batches import Batch
from lora_engine.training.examples import Example
from lora_engine.training.objective import noisy_and_target
from lora_engine.training.specs.methods import Identity

# OpenAI's for CLIP; taken where a folder does not say otherwise.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class SubjectEmbedder:
    """Unit vectors of pictures, with a way back to their pixels.

    Args:
        model: Of transformers, frozen; CLIP's picture half, or anything with a pooled output.
        side: Pixels of a side of what it reads.
        mean: Per channel, of pictures in [0, 1].
        std: Per channel.
    """

    def __init__(self, model: Any, side: int, mean: Iterable[float] = _MEAN, std: Iterable[float] = _STD) -> None:
        self._model, self._side = model.eval().requires_grad_(False), side
        self._mean = torch.tensor(list(mean)).view(1, 3, 1, 1)
        self._std = torch.tensor(list(std)).view(1, 3, 1, 1)

    def to(self, device: torch.device) -> SubjectEmbedder:
        """The same on another device."""
        self._model = self._model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def __call__(self, pixels: Tensor) -> Tensor:
        """Images [n, 3, height, width] in [-1, 1] -> float32 [n, d] of length 1; keeps the graph.

        A picture is resized to the embedder's square as a whole, so that nothing of the subject is cut off.
        """
        values = F.interpolate(pixels.float(), (self._side, self._side), mode="bilinear", antialias=True)
        values = (values * 0.5 + 0.5 - self._mean) / self._std
        output = self._model.get_image_features if hasattr(self._model, "get_image_features") else self._model
        return F.normalize(_pooled(output(pixel_values=values)).float(), dim=-1)


def load_subject_embedder(folder: Path | None = None) -> SubjectEmbedder:
    """The embedder of a local folder; without one, the embedded base's CLIP.

    Raises:
        SettingsError: The folder holds no image model with weights that transformers can load.
    """
    from transformers import AutoModel

    if folder is None:
        from lora_engine.bases.tiny import folder as tiny_folder

        folder = tiny_folder() / "clip"
    try:
        # Building a model draws from the global generator; it is given back as it was.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars():
            model, loading = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SettingsError(
            f"the embedder cannot be loaded ({error})",
            where=str(folder),
            allowed="a local folder with config.json and model.safetensors of an image model",
            remedy="save the model with save_pretrained, or leave embedder out",
        ) from None
    if missing := sorted(loading["missing_keys"]):
        # transformers would go on with random weights and only say so in its log.
        problem = f"{len(missing)} weights of the embedder are missing, first {missing[0]}"
        raise SettingsError(problem, where=str(folder))
    config = getattr(model.config, "vision_config", model.config)
    side = getattr(config, "image_size", None)
    if not isinstance(side, int):
        raise SettingsError(
            "the embedder does not say how large the pictures are that it reads",
            where=str(folder / "config.json"),
            allowed="a model whose configuration has image_size",
        )
    align_weights(model)
    prepared = _preparation(folder)
    return SubjectEmbedder(model, side, prepared.get("image_mean", _MEAN), prepared.get("image_std", _STD))


@dataclass(frozen=True)
class IdentityLoss:
    """How far the decoded prediction is from the person's pictures, as the embedder sees it.

    Attributes:
        base: Decodes; the gradient goes through its decoder.
        embedder: Sees.
        wanted: float32 [d] of length 1: the mean embedding of the person's pictures.
        settings: See `Identity`.
    """

    base: BaseModel
    embedder: SubjectEmbedder
    wanted: Tensor
    settings: Identity
    name: str = "identity"

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """The weight times the mean of 1 - cosine over the rows with little noise; 0 where there are none."""
        del target
        early = batch.timesteps[: batch.instances] < self.settings.until * self.base.noise.timesteps
        rows = torch.nonzero(early).flatten()
        if not len(rows):
            # Zero with a graph, so that every batch has a way back.
            return predicted[:0].sum()
        noisy, _ = noisy_and_target(self.base.noise, batch)
        clean = predicted_clean(self.base.noise, noisy[rows], predicted[rows], batch.timesteps[rows])
        pixels = middle(self.base.decode_latents(clean), self.settings.crop)
        similarity = self.embedder(pixels.clamp(-1.5, 1.5)) @ self.wanted
        # Over all of the person's rows, so that a batch with one early row does not count as much as one full of them.
        return self.settings.weight * (1.0 - similarity).sum() / batch.instances


def identity_loss(
    base: BaseModel, settings: Identity, examples: Iterable[Example], folder: Path | None
) -> IdentityLoss:
    """The loss, with the mean embedding of the examples.

    Raises:
        SettingsError: The embedder cannot be loaded.
    """
    embedder = load_subject_embedder(folder).to(base.device)
    with torch.no_grad():
        # One picture at a time: they have several sizes, and neighbours could change the last bits.
        found = [
            embedder(middle(read_pixels(example.file)[None].to(base.device), settings.crop))[0] for example in examples
        ]
    return IdentityLoss(base, embedder, F.normalize(torch.stack(found).mean(dim=0), dim=0), settings)


def predicted_clean(schedule: NoiseSchedule, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
    """The picture that a prediction stands for, whatever the parameterisation: latents in the shape of `noisy`.

    Noisy latents and targets are linear in picture and noise, x_t = a x0 + b e and y = c x0 + d e; so
    x0 = (d x_t - b y) / (a d - b c). Where nothing of the picture is left, and noise is predicted, there is no answer:
    ask at timesteps with a signal.
    """
    one = torch.ones(len(timesteps), *[1] * (noisy.dim() - 1), device=noisy.device)
    none = torch.zeros_like(one)
    a, b = schedule.add_noise(one, none, timesteps), schedule.add_noise(none, one, timesteps)
    c, d = schedule.target(one, none, timesteps), schedule.target(none, one, timesteps)
    return (d * noisy - b * predicted) / (a * d - b * c)


def middle(pixels: Tensor, share: float) -> Tensor:
    """The middle of pictures [n, 3, height, width]: that share of both sides, at least one pixel."""
    height, width = (max(1, round(side * share)) for side in pixels.shape[-2:])
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _pooled(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if found is None:
        # Models without a pooled output: the mean over what they say of each place, in a grid or in a row.
        states = output.last_hidden_state
        found = states.mean(dim=(2, 3)) if states.dim() == 4 else states.mean(dim=1)
    pooled: Tensor = found.flatten(1)
    return pooled


def _preparation(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "preprocessor_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
