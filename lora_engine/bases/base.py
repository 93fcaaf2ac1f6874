"""The one protocol of base models, and how one is loaded. What a family computes lives in its own module."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.families import families
from lora_engine.bases.noise import NoiseSchedule
from lora_engine.bases.one_at_a_time import BUILDING
from lora_engine.bases.quantized import Quantization, check_quantization, quantize_base
from lora_engine.bases.source import BaseSource, resolve_base


class BaseModel(Protocol):
    """A diffusion model as training, evaluation and generation see it; frozen, in evaluation mode.

    Attributes:
        family: The family that its adapters belong to: `sd`, `sdxl`, `sd3` or `flux`.
        name: What cards call it; free of paths.
        fingerprint: SHA-256 over its files.
        device: Where it computes.
        dtype: Of the network's weights; latents, losses and pictures are float32 everywhere.
        modules: The adaptable components: `unet` or `transformer`, `text_encoder`[, `text_encoder_2`[, ...]].
        noise: The forward process and the parameterisation; a `FlowSchedule` for flow matching.
        default_size: (height, width) in pixels that it was made for.
        distilled: Whether it was distilled to follow its text: it is asked once a step, and `predict` is told the
            scale of guidance where its network reads one.
        inpaints: Whether `predict` needs what `encode_mask` gives.
        quantisation: How the linear layers of its network are held: `none`, `8bit` or `4bit`.
    """

    family: str
    name: str
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    modules: dict[str, nn.Module]
    noise: NoiseSchedule
    default_size: tuple[int, int]
    distilled: bool
    inpaints: bool
    quantisation: Quantization

    def module_names(self) -> list[str]:
        """Canonical names of the adaptable layers (Linear, Conv2d), in the order of the model.

        Text encoders always carry the level `text_model`, whatever the installed version of transformers does.
        """
        ...

    def get_module(self, name: str) -> nn.Module:
        """The module of a canonical name."""
        ...

    def set_module(self, name: str, module: nn.Module) -> None:
        """Puts another module in its place."""
        ...

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels [n, 3, h, w] in [-1, 1] as scaled latents: the posterior's mode, or a sample with the generator."""
        ...

    def encode_mask(self, mask: Tensor, pixels: Tensor) -> Conditioning:
        """What an inpainting base is told beside the text; join it to that with `Conditioning.with_tensors`.

        Args:
            mask: [n, 1, h, w]: 0.5 and above is what is drawn anew, below it is kept.
            pixels: [n, 3, h, w] in [-1, 1], whole.

        Returns:
            `mask` [n, 1, height, width] of 0 and 1 and `masked` [n, channels, height, width], the latents of the
            pictures with grey under the mask; both in the size of the latents.

        Raises:
            SettingsError: The base is not made for inpainting, or the shapes do not fit.
        """
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents as pixels [n, 3, h, w]; not clipped."""
        ...

    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """One row a text; `size` (height, width) in pixels is needed by families that are told it."""
        ...

    def encode_negative(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """As `encode_text`, for the other side of classifier-free guidance."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the network makes of noisy latents at timesteps [n]; float32; keeps the graph.

        Timesteps are int64 numbers into the schedule for diffusion, and any dtype (sigma times 1000) for a flow.
        """
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of that size in pixels.

        Raises:
            SettingsError: The size is not a multiple of what the model needs.
        """
        ...

    def scheduler(self, steps: int | None = None, size: tuple[int, int] | None = None) -> Any:
        """A fresh sampler of diffusers with the model's own settings: DPM-Solver++, or Euler's method for a flow.

        Args:
            steps: Its timesteps are set to so many; None leaves them to the caller.
            size: (height, width) in pixels, on which the timesteps of some flows depend; None is `default_size`.
        """
        ...


def load_base(
    source: BaseSource | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    quantise: Quantization = "none",
) -> BaseModel:
    """Loads a base model, frozen.

    Args:
        source: Where it lies, or a name for `resolve_base`.
        device: Where it is to compute; None takes CUDA, else MPS, else the CPU.
        dtype: Of the network and the text encoders; the autoencoder always computes in float32.
        quantise: How the linear layers of the network's blocks are held; see `quantize_base`.

    Raises:
        BaseModelError: It cannot be found or its parts do not fit.
        SettingsError: What quantisation needs is not installed.
    """
    found = resolve_base(source) if isinstance(source, str) else source
    check_quantization(quantise)
    with BUILDING:
        module = importlib.import_module(families[found.family].module)
    base = cast(BaseModel, module.load(found, torch.device(device or default_device()), dtype))
    quantize_base(base, quantise)
    base.quantisation = quantise
    return base


def masked_whole(base: BaseModel, conditioning: Conditioning, size: tuple[int, int]) -> Conditioning:
    """The conditioning, for an inpainting base with a mask over the whole picture: as if it were a base without mask.

    Args:
        base: Any base.
        conditioning: What `encode_text` gave.
        size: (height, width) in pixels.
    """
    if not base.inpaints:
        return conditioning
    whole = base.encode_mask(torch.ones(1, 1, *size), torch.zeros(1, 3, *size))
    return conditioning.with_tensors(whole.index([0] * len(conditioning)))


def default_device() -> str:
    """The fastest kind of device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
