"""Implements the common part of all families: autoencoder, denoiser, text encoders, tree of adaptable layers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from lora_engine.adapters.tree import DictTree
from lora_engine.bases.components import load_autoencoder, load_component
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.noise import NoiseSchedule
from lora_engine.bases.options import BaseOptions
from lora_engine.bases.quantized import Quantization
from lora_engine.bases.source import BaseSource
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.framing import Framing

_log = logging.getLogger(__name__)


class LatentModel(ABC):
    """A loaded and frozen latent diffusion model, the base class of the families. See `BaseModel`.

    Args:
        source: The source of the base.
        device: The device for the weights.
        dtype: Dtype of the denoiser and the text encoders.
        denoiser: The class of the component `unet` or `transformer`.
    """

    denoiser_name = "unet"
    distilled = False
    inpaints = False
    quantization: Quantization = "none"
    noise: NoiseSchedule

    def __init__(self, source: BaseSource, device: torch.device, dtype: torch.dtype, denoiser: Any) -> None:
        self.family, self.name = source.family, source.label
        self.fingerprint = source.fingerprint()
        self.device, self.dtype = device, dtype
        self.denoiser: Any = load_component(denoiser, source, self.denoiser_name, dtype).to(device)
        self.vae: Any = load_component(AutoencoderKL, source, "vae", torch.float32).to(device)
        self.modules: dict[str, nn.Module] = {self.denoiser_name: self.denoiser}
        self._index = source.layout.index
        self._load_text(source)
        self._scheduler_settings = self._load_schedule(source)
        self._unchanged = self.vae, self._scheduler_settings
        self._tree = DictTree(self.modules, self.family, self.fingerprint)
        self._names = self._tree.module_names()
        self.default_size = self._default_size()
        self.options = BaseOptions()
        self._check_channels(source)

    def __repr__(self) -> str:
        return f"<BaseModel {self.name} of family {self.family}, {self.dtype} on {self.device}>"

    def configure(self, options: BaseOptions) -> None:
        """See `BaseModel`; changes the autoencoder alone."""
        others = sorted(replace(options, vae=None).key())
        if others:
            raise SettingsError(
                f"{others[0]} is set, but the base {self.name!r} is of family {self.family!r}",
                allowed="bases with CLIP text encoders and a diffusion schedule: Stable Diffusion 1, 2 and XL",
                remedy=f"leave {', '.join(others)} out",
            )
        self._set_options(options)

    def _set_options(self, options: BaseOptions) -> None:
        self.options = options
        self.vae, self._scheduler_settings = self._unchanged
        if options.vae is None:
            return
        vae: Any = load_autoencoder(AutoencoderKL, options.vae, torch.float32).to(self.device)
        for name, read in (("latent channels", _latent_channels), ("pixels per latent", _side_factor)):
            if read(vae) != read(self.vae):
                raise BaseModelError(
                    f"the autoencoder {options.vae.label!r} has another number of {name} ({read(vae)}) than that of "
                    f"the base ({read(self.vae)})",
                    where="vae",
                    remedy="choose an autoencoder that was made for the base",
                )
        self.vae = vae

    def module_names(self) -> list[str]:
        """See `BaseModel`."""
        return list(self._names)

    def get_module(self, name: str) -> nn.Module:
        """See `BaseModel`."""
        return self._tree.get_module(name)

    def set_module(self, name: str, module: nn.Module) -> None:
        """See `BaseModel`."""
        self._tree.set_module(name, module)

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `BaseModel`."""
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        latents: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents - self._shift) * float(self.vae.config.scaling_factor)

    def encode_mask(self, mask: Tensor, pixels: Tensor) -> Conditioning:
        """Raises `SettingsError`: this base takes no mask."""
        del mask, pixels
        raise SettingsError(
            f"the base {self.name!r} is not an inpainting base and takes no mask",
            allowed="an inpainting base, such as stable-diffusion-inpainting",
            remedy="choose such a base, or remove the masks",
        )

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `BaseModel`."""
        scaled = latents.to(self.device, torch.float32) / float(self.vae.config.scaling_factor) + self._shift
        pixels: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return pixels

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """See `BaseModel`."""
        height, width = size
        side = self._factor * self._patch
        if min(size) < side or height % side or width % side:
            raise SettingsError(
                f"the base {self.name!r} cannot generate images of {height} x {width} pixels",
                allowed=f"multiples of {side}, such as {self.default_size[0]} x {self.default_size[1]}",
            )
        return _latent_channels(self.vae), height // self._factor, width // self._factor

    @abstractmethod
    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`."""

    def with_framings(self, conditioning: Conditioning, framings: Sequence[Framing]) -> Conditioning:
        """See `BaseModel`; unchanged."""
        del framings
        return conditioning

    @abstractmethod
    def _load_text(self, source: BaseSource) -> None:
        """Loads tokenizers and text encoders, and adds the encoders to `modules`."""

    @abstractmethod
    def _load_schedule(self, source: BaseSource) -> dict[str, Any]:
        """Sets `noise` and returns the settings of the scheduler."""

    def _default_size(self) -> tuple[int, int]:
        # In latents; a transformer of any size has none, and only the autoencoder has one, in pixels.
        latents = self.denoiser.config.get("sample_size")
        side = int(self.vae.config.sample_size) if latents is None else int(latents) * self._factor
        return side, side

    def _settings_of_scheduler(self, source: BaseSource) -> dict[str, Any]:
        try:
            return dict(DDPMScheduler.load_config(str(source.folder), subfolder="scheduler", local_files_only=True))
        except (OSError, ValueError) as error:
            raise BaseModelError(f"cannot be used ({error})", where=str(source.folder / "scheduler")) from error

    @property
    def _patch(self) -> int:
        """Side of a patch of the network in latent pixels."""
        return 1

    @property
    def _factor(self) -> int:
        return _side_factor(self.vae)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.shift_factor or 0.0)

    def _tokens(self, texts: Sequence[str], suffix: str, tokenizer: Any, limit: int | None = None) -> dict[str, Any]:
        encoder: Any = self.modules[f"text_encoder{suffix}"]
        length = min(int(tokenizer.model_max_length), limit or int(encoder.config.max_position_embeddings))
        encoding = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
            if len(ids) > length:
                _log.warning("the text %r has %d tokens; the base reads the first %d", text[:80], len(ids), length)
        inputs: dict[str, Any] = {"input_ids": encoding.input_ids.to(self.device)}
        if getattr(encoder.config, "use_attention_mask", False):
            inputs["attention_mask"] = encoding.attention_mask.to(self.device)
        return inputs

    def _input_channels(self) -> Mapping[str, int]:
        """Returns the channels of each part of the network's input."""
        return {"latents": _latent_channels(self.vae)}

    def _network_channels(self) -> int:
        return int(self.denoiser.config.in_channels)

    def _check_channels(self, source: BaseSource) -> None:
        network, parts = self._network_channels(), self._input_channels()
        if network != sum(parts.values()):
            listed = ", ".join(f"{name} {channels}" for name, channels in parts.items())
            raise BaseModelError(
                f"its network takes {network} channels, and its pipeline provides {sum(parts.values())} ({listed})",
                where=str(source.folder),
                allowed="a base whose network and autoencoder belong together",
                remedy="for an inpainting base, name an inpainting pipeline in model_index.json",
            )


def _latent_channels(vae: Any) -> int:
    return int(vae.config.latent_channels)


def _side_factor(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))
