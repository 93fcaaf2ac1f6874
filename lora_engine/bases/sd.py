"""Stable Diffusion 1.x and 2.x, and the embedded base, which is one of them in small.

Source of the computations: `StableDiffusionPipeline` of diffusers; a parity test holds them to it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.adapters.tree import DictTree
from lora_engine.bases.components import load_component, load_tokenizer
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.noise import schedule_from
from lora_engine.bases.source import BaseSource
from lora_engine.errors import BaseModelError, SettingsError

_log = logging.getLogger(__name__)


def load(source: BaseSource, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """Loads a base of this family; see `load_base`."""
    return StableDiffusion(source, device, dtype)


class StableDiffusion:
    """A UNet, an autoencoder and one CLIP text encoder; see `BaseModel`."""

    def __init__(self, source: BaseSource, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        self.family, self.name, self.fingerprint = source.family, source.label, source.fingerprint()
        self.device, self.dtype = device, dtype
        self.unet: Any = load_component(UNet2DConditionModel, source, "unet", dtype).to(device)
        self.vae: Any = load_component(AutoencoderKL, source, "vae", torch.float32).to(device)
        self.modules: dict[str, nn.Module] = {"unet": self.unet}
        self._load_text(source)
        self._load_schedule(source)
        self._index = source.layout.index
        self._tree = DictTree(self.modules, self.family, self.fingerprint)
        self._names = self._tree.module_names()
        side = int(self._settings("unet").sample_size) * self._factor
        self.default_size = (side, side)
        self._check_channels(source)

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

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `BaseModel`."""
        scaled = latents.to(self.device, torch.float32) / float(self.vae.config.scaling_factor) + self._shift
        pixels: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return pixels

    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`."""
        del size
        output = self.modules["text_encoder"](**self._tokens(texts, "", self.tokenizer))
        return Conditioning({"states": output[0].float()})

    def encode_negative(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`."""
        return self.encode_text(texts, size)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `BaseModel`."""
        output: Tensor = self.unet(
            noisy.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditioning["states"].to(self.dtype),
            added_cond_kwargs=self._added(conditioning),
            return_dict=False,
        )[0]
        return output.float()

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """See `BaseModel`."""
        height, width = size
        if min(size) < self._factor or height % self._factor or width % self._factor:
            raise SettingsError(
                f"the base {self.name!r} cannot make pictures of {height} x {width} pixels",
                allowed=f"multiples of {self._factor}, such as {self.default_size[0]} x {self.default_size[1]}",
            )
        return int(self.unet.config.in_channels), height // self._factor, width // self._factor

    def scheduler(self) -> Any:
        """See `BaseModel`."""
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(self._scheduler_settings)

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        del conditioning
        return None

    def _load_text(self, source: BaseSource) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        self.tokenizer = load_tokenizer(CLIPTokenizer, source, "tokenizer")
        self.modules["text_encoder"] = load_component(CLIPTextModel, source, "text_encoder", self.dtype).to(self.device)

    def _load_schedule(self, source: BaseSource) -> None:
        from diffusers import DDPMScheduler

        try:
            settings = dict(DDPMScheduler.load_config(str(source.folder), subfolder="scheduler", local_files_only=True))
            training = DDPMScheduler.from_config(settings)
        except (OSError, ValueError, NotImplementedError) as error:
            raise BaseModelError(f"cannot be used ({error})", where=str(source.folder / "scheduler")) from error
        self._scheduler_settings = settings
        self.noise = schedule_from(training.alphas_cumprod, str(training.config.prediction_type))

    def _settings(self, component: str) -> Any:
        return self.modules[component].config

    @property
    def _factor(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def _shift(self) -> float:
        return float(self.vae.config.shift_factor or 0.0)

    def _tokens(self, texts: Sequence[str], suffix: str, tokenizer: Any) -> dict[str, Any]:
        encoder: Any = self.modules[f"text_encoder{suffix}"]
        length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
        found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
            if len(ids) > length:
                _log.warning("the text %r has %d tokens; the base reads the first %d", text[:80], len(ids), length)
        inputs: dict[str, Any] = {"input_ids": found.input_ids.to(self.device)}
        if getattr(encoder.config, "use_attention_mask", False):
            inputs["attention_mask"] = found.attention_mask.to(self.device)
        return inputs

    def _check_channels(self, source: BaseSource) -> None:
        network, latents = int(self.unet.config.in_channels), int(self.vae.config.latent_channels)
        if network != latents:
            raise BaseModelError(
                f"its network takes {network} channels and its latents have {latents}",
                where=str(source.folder),
                allowed="a text-to-image base; inpainting bases are not trained yet",
            )
