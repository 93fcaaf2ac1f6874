"""Implements Stable Diffusion 1.x and 2.x, including the embedded base, which is a small one.

Follows `StableDiffusionPipeline` of diffusers; a parity test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lora_engine.bases.components import load_component, load_tokenizer
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.latent import LatentModel
from lora_engine.bases.long_text import StateChange, no_change
from lora_engine.bases.noise import schedule_from
from lora_engine.bases.options import BaseOptions
from lora_engine.bases.samplers import find_sampler, steps_refused
from lora_engine.bases.source import BaseSource
from lora_engine.building import BUILDING
from lora_engine.errors import BaseModelError, SettingsError


class StableDiffusion(LatentModel):
    """A UNet, an autoencoder and one CLIP text encoder; see `BaseModel`."""

    def __init__(self, source: BaseSource, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype, UNet2DConditionModel)

    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`."""
        tokens = {suffix: self._tokens(texts, suffix, tokenizer) for suffix, tokenizer in self.tokenizers().items()}
        return self.encode_tokens(tokens, size)

    def tokenizers(self) -> Mapping[str, Any]:
        """See `ReadsTokens`."""
        return {"": self.tokenizer}

    def encode_tokens(
        self,
        tokens: Mapping[str, Mapping[str, Tensor]],
        size: tuple[int, int] | None = None,
        change: StateChange = no_change,
    ) -> Conditioning:
        """See `ReadsTokens`."""
        del size
        encoder: Any = self.modules["text_encoder"]
        if self.options.clip_skip is None:
            states = encoder(**tokens[""])[0]
        else:
            states = encoder(**tokens[""], output_hidden_states=True).hidden_states[-self.options.clip_skip]
            # The final norm applies to any layer, as in sd-scripts and diffusers.
            states = getattr(encoder, "text_model", encoder).final_layer_norm(states)
        return Conditioning({"states": change("", states.float())})

    def encode_negative(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`."""
        return self.encode_text(texts, size)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `BaseModel`."""
        output: Tensor = self.denoiser(
            self._network_input(noisy, conditioning).to(self.dtype),
            timesteps,
            encoder_hidden_states=conditioning["states"].to(self.dtype),
            added_cond_kwargs=self._added(conditioning),
            return_dict=False,
        )[0]
        return output.float()

    def scheduler(
        self, steps: int | None = None, size: tuple[int, int] | None = None, sampler: str | None = None
    ) -> Any:
        """See `BaseModel`."""
        del size
        chosen = find_sampler(sampler or "dpmsolver++")
        with BUILDING:
            scheduler = getattr(diffusers, chosen.scheduler).from_config(self._scheduler_settings, **chosen.options)
        if steps is not None:
            with steps_refused(chosen.title, steps):
                scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def configure(self, options: BaseOptions) -> None:
        """See `BaseModel`."""
        self._set_options(options)
        self._check_layers(options.clip_skip)
        changes: dict[str, Any] = {"prediction_type": options.prediction} if options.prediction else {}
        if options.zero_terminal_snr:
            # Sampling has to begin at the last timestep (Lin et al. 2023, section 3.4).
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self._scheduler_settings = {**self._scheduler_settings, **changes}
        self._set_noise("scheduler")
        if options.zero_terminal_snr and self.noise.parameterization == "eps":
            raise SettingsError(
                "zero_terminal_snr is set, but the base predicts noise, and the last timestep is nothing else",
                remedy="set prediction to v_prediction, or leave zero_terminal_snr out",
            )

    def _check_layers(self, clip_skip: int | None) -> None:
        for name, encoder in self.modules.items():
            config: Any = encoder.config
            if name.startswith("text_encoder") and clip_skip and clip_skip > config.num_hidden_layers:
                raise SettingsError(
                    f"clip_skip is {clip_skip}, but {name} has {config.num_hidden_layers} layers",
                    allowed=f"1 to {config.num_hidden_layers}",
                )

    def _network_input(self, noisy: Tensor, conditioning: Conditioning) -> Tensor:
        del conditioning
        return noisy

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        del conditioning
        return None

    def _load_text(self, source: BaseSource) -> None:
        self.tokenizer = load_tokenizer(CLIPTokenizer, source, "tokenizer")
        self.modules["text_encoder"] = load_component(CLIPTextModel, source, "text_encoder", self.dtype).to(self.device)

    def _load_schedule(self, source: BaseSource) -> dict[str, Any]:
        settings = self._settings_of_scheduler(source)
        self._scheduler_settings = settings
        self._set_noise(str(source.folder / "scheduler"))
        return settings

    def _set_noise(self, where: str) -> None:
        try:
            with BUILDING:
                training = DDPMScheduler.from_config(self._scheduler_settings)
        except (ValueError, NotImplementedError) as error:
            raise BaseModelError(f"cannot be used ({error})", where=where) from error
        self.noise = schedule_from(training.alphas_cumprod, str(training.config.prediction_type))
