"""Writes bases of the published architectures with random weights and few channels.

Their images are noise. They test pipeline files, module names and file formats without gigabytes of weights: block
types and module names are those of the published bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_engine.registries import Registry
from tests.support.untrained_parts import autoencoder, clip_text_encoder, spelling_tokenizer
from tests.support.untrained_transformers import TransformerShape


class Shape(Protocol):
    """The structure of one architecture."""

    def pipeline(self, tokens: int) -> Any:
        """Builds the pipeline with weights from the global generator; its CLIPs read `tokens` tokens."""
        ...


@dataclass(frozen=True)
class UnetShape:
    """The structure of a Stable Diffusion 1, 2 or XL.

    Attributes:
        unet: Settings of `UNet2DConditionModel`.
        text_layers: Layers of each text encoder; two encoders make an SDXL.
        vae_channels: Widths of the autoencoder's levels; it downscales by 2^(levels - 1).
        vae_layers: Layers per level of the autoencoder.
        text_widths: Width of each text encoder.
        prediction_type: `prediction_type` of the scheduler's configuration.
        inpainting: True if the network also reads a mask and masked latents.
    """

    unet: dict[str, Any]
    text_layers: tuple[int, ...]
    vae_channels: tuple[int, ...]
    prediction_type: str = "epsilon"
    vae_layers: int = 1
    text_widths: tuple[int, ...] = (16, 16)
    inpainting: bool = False

    def pipeline(self, tokens: int) -> Any:
        """See `Shape`."""
        import diffusers

        parts: dict[str, Any] = {
            "vae": autoencoder(self.vae_channels, self.vae_layers, 4),
            "unet": self._unet(),
            "scheduler": diffusers.DDIMScheduler(**_SCHEDULE, prediction_type=self.prediction_type),
        }
        for position, layers in enumerate(self.text_layers):
            suffix = f"_{position + 1}" if position else ""
            width = self.text_widths[position]
            parts[f"text_encoder{suffix}"] = clip_text_encoder(layers, width, tokens, projected=position == 1)
            parts[f"tokenizer{suffix}"] = spelling_tokenizer(tokens)
        middle = "Inpaint" if self.inpainting else ""
        if len(self.text_layers) == 1:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return getattr(diffusers, f"StableDiffusion{middle}Pipeline")(**parts)
        return getattr(diffusers, f"StableDiffusionXL{middle}Pipeline")(**parts, add_watermarker=False)

    def _unet(self) -> Any:
        from diffusers import UNet2DConditionModel

        extra: dict[str, Any] = {"in_channels": 9} if self.inpainting else {}
        if len(self.text_layers) == 2:
            size_width = 6 * int(self.unet["addition_time_embed_dim"])
            extra["projection_class_embeddings_input_dim"] = size_width + self.text_widths[1]
        return UNet2DConditionModel(
            sample_size=8,
            cross_attention_dim=sum(self.text_widths[: len(self.text_layers)]),
            norm_num_groups=4,
            **self.unet,
            **extra,
        )


_SD = {
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 2,
    "attention_head_dim": 2,
}
_XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 32),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}
# As in the files of Stable Diffusion 1.5, 2 and XL.
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_SMALL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 2,
}

shapes: Registry[Shape] = Registry("shape of an untrained base")
# Neighboring levels have equal widths exactly where the published autoencoder has.
_VAE = (4, 8, 16, 16)
shapes.add("sd15", UnetShape(_SD, (12,), _VAE, vae_layers=2))
shapes.add("sd2", UnetShape({**_SD, "use_linear_projection": True}, (23,), _VAE, "v_prediction", vae_layers=2))
shapes.add("sdxl", UnetShape(_XL, (12, 32), _VAE, vae_layers=2, text_widths=(16, 24)))
shapes.add("small-sd", UnetShape(_SMALL, (2,), (8, 8)))
shapes.add("small-sd-v", UnetShape(_SMALL, (2,), (8, 8), "v_prediction"))
_SMALL_XL = {**_SMALL, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
shapes.add("small-sdxl", UnetShape(_SMALL_XL, (2, 3), (8, 8)))
shapes.add("sd-inpainting", UnetShape(_SD, (12,), _VAE, vae_layers=2, inpainting=True))
shapes.add("sdxl-inpainting", UnetShape(_XL, (12, 32), _VAE, vae_layers=2, text_widths=(16, 24), inpainting=True))
shapes.add("small-sd-inpainting", UnetShape(_SMALL, (2,), (8, 8), inpainting=True))
shapes.add("small-sdxl-inpainting", UnetShape(_SMALL_XL, (2, 3), (8, 8), inpainting=True))

# As in the files of Stable Diffusion 3 and 3.5 and of FLUX.1.
_SHIFTED = {"shift": 3.0}
_FLUX_SCHEDULE = {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}
_SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
_FLUX = {"num_layers": 19, "num_single_layers": 38}
_WIDE: dict[str, Any] = {"vae_channels": _VAE, "vae_layers": 2, "latent_channels": 16}
shapes.add("sd3", TransformerShape({"num_layers": 24}, (12, 32), 24, schedule=_SHIFTED, **_WIDE))
shapes.add("sd35-medium", TransformerShape({"num_layers": 24, **_SD35}, (12, 32), 24, schedule=_SHIFTED, **_WIDE))
shapes.add("flux", TransformerShape({**_FLUX, "guidance_embeds": True}, (12,), 24, schedule=_FLUX_SCHEDULE, **_WIDE))
shapes.add("flux-schnell", TransformerShape({**_FLUX, "guidance_embeds": False}, (12,), 24, **_WIDE))
_TWO = {"num_layers": 2}
_SMALL_SD35 = {**_TWO, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
_SMALL_FLUX = {"num_layers": 1, "num_single_layers": 2}
shapes.add("small-sd3", TransformerShape(_TWO, (2, 3), 2, schedule=_SHIFTED))
# diffusers' pipeline for masks takes 16 channels only.
shapes.add("small-sd3-wide", TransformerShape(_TWO, (2, 3), 2, latent_channels=16, schedule=_SHIFTED))
shapes.add("small-sd3-without-t5", TransformerShape(_TWO, (2, 3), 0, schedule=_SHIFTED))
shapes.add("small-sd35", TransformerShape(_SMALL_SD35, (2, 3), 2, schedule=_SHIFTED))
shapes.add("small-flux", TransformerShape({**_SMALL_FLUX, "guidance_embeds": True}, (2,), 2, schedule=_FLUX_SCHEDULE))
shapes.add("small-flux-schnell", TransformerShape({**_SMALL_FLUX, "guidance_embeds": False}, (2,), 2))


def write_untrained_base(folder: Path, shape: str, *, seed: int = 0, tokens: int = 16) -> Path:
    """Writes a diffusers folder with random weights and returns its path.

    Args:
        folder: The folder; created if it is missing.
        shape: A name among `shapes`; `sd15`, `sdxl`, `flux` ... have the published blocks, `small-*` a minimum.
        seed: Seed of the weights; the state of the global generator is restored.
        tokens: Number of tokens that CLIP reads.

    Raises:
        SettingsError: An unknown shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = shapes[shape].pipeline(tokens)
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def save_tiny_vae(folder: Path, factor: float = 1.5) -> Path:
    """Writes the embedded base's autoencoder with other weights as a folder of its own, and returns the path."""
    from lora_engine.bases.tiny import folder as tiny_folder

    return save_other_vae(tiny_folder(), folder, factor)


def save_other_vae(base: Path, folder: Path, factor: float = 1.5) -> Path:
    """Writes the autoencoder of a base with other weights as a folder of its own, and returns the path."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(str(base), subfolder="vae")
    with torch.no_grad():
        for value in vae.parameters():
            value.mul_(factor)
    vae.save_pretrained(str(folder))
    return folder
