"""Builds SD3 and FLUX.1 pipelines with random weights; `untrained` writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.support.untrained_parts import (
    autoencoder,
    clip_text_encoder,
    letters_tokenizer,
    spelling_tokenizer,
    t5_encoder,
)

CLIP_WIDTH = 16


@dataclass(frozen=True)
class TransformerShape:
    """The structure of one SD3 or FLUX.1.

    Attributes:
        transformer: Additional settings of the transformer's class.
        text_layers: Layers of each CLIP; two CLIPs make an SD3.
        t5_layers: Layers of T5; 0 is no T5, which SD3 allows.
        vae_channels: Widths of the autoencoder's levels; it downscales by 2^(levels - 1).
        vae_layers: Layers per level of the autoencoder.
        latent_channels: Latent channels of the autoencoder.
        schedule: Settings of the scheduler.
        t5_tokens: Largest number of tokens for T5.
    """

    transformer: dict[str, Any]
    text_layers: tuple[int, ...]
    t5_layers: int
    vae_channels: tuple[int, ...] = (8, 8)
    vae_layers: int = 1
    latent_channels: int = 4
    schedule: dict[str, Any] = field(default_factory=dict)
    t5_tokens: int = 24

    def pipeline(self, tokens: int) -> Any:
        """Builds the pipeline with weights from the global generator; its CLIPs read `tokens` tokens."""
        from diffusers import FluxPipeline, StableDiffusion3Pipeline

        sd3 = len(self.text_layers) == 2
        parts: dict[str, Any] = {
            "vae": autoencoder(self.vae_channels, self.vae_layers, self.latent_channels, scaling_factor=1.5, shift=0.1),
            "transformer": self._sd3() if sd3 else self._flux(),
            "scheduler": self._scheduler(),
        }
        for position, layers in enumerate(self.text_layers):
            suffix = f"_{position + 1}" if position else ""
            parts[f"text_encoder{suffix}"] = clip_text_encoder(layers, CLIP_WIDTH, tokens, projected=sd3)
            parts[f"tokenizer{suffix}"] = spelling_tokenizer(tokens)
        last = f"_{len(self.text_layers) + 1}"
        parts[f"text_encoder{last}"] = t5_encoder(self.t5_layers, 2 * CLIP_WIDTH) if self.t5_layers else None
        parts[f"tokenizer{last}"] = letters_tokenizer(self.t5_tokens) if self.t5_layers else None
        return (StableDiffusion3Pipeline if sd3 else FluxPipeline)(**parts)

    def _sd3(self) -> Any:
        from diffusers import SD3Transformer2DModel

        heads = 2
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            num_attention_heads=heads,
            attention_head_dim=8,
            caption_projection_dim=heads * 8,
            joint_attention_dim=2 * CLIP_WIDTH,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=16,
            **self.transformer,
        )

    def _flux(self) -> Any:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * self.latent_channels,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=2 * CLIP_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            axes_dims_rope=(2, 2, 4),
            **self.transformer,
        )

    def _scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **self.schedule)
