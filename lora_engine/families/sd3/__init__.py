"""Stable Diffusion 3 and 3.5 (Stability AI)."""

from __future__ import annotations

from lora_engine.families.family import Family, HeaderVersion, Pipeline, Size, Targets, families
from lora_engine.families.latent_colors import SD3_COLORS
from lora_engine.families.sd3.names import SD3_NAMES, WIDTHS, swaps_halves
from lora_engine.families.sd3.published import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from lora_engine.families.text_encoders import CLIP_G, CLIP_L, T5_TEXT, T5_XXL
from lora_engine.families.training_defaults import TrainingDefaults

_OPTIONAL = ("text_encoder_3", "tokenizer_3")
_COMPONENTS = (
    *("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"),
    *_OPTIONAL,
)

SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3",
    pipelines=(
        Pipeline("StableDiffusion3Pipeline", "lora_engine.families.sd3.model:StableDiffusion3", _COMPONENTS, _OPTIONAL),
    ),
    published=(SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE),
    names=SD3_NAMES,
    sizes=(
        Size("Stable Diffusion 3 medium", {"transformer_blocks": 24}, {"w": WIDTHS[0]}),
        Size("Stable Diffusion 3.5 large", {"transformer_blocks": 38}, {"w": WIDTHS[1]}),
    ),
    swapped=swaps_halves,
    text={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    header=r"(sd_?|stable_diffusion_v?)3.*",
    versions=(HeaderVersion("sd3", "stable-diffusion-3/lora"),),
    targets=Targets(text=rf"{Targets.text}|text_encoder.*\.({T5_TEXT})"),
    latent_colors=SD3_COLORS,
    training=TrainingDefaults(
        resolution=1024,
        learning_rate=1e-4,
        rank=16,
        gradient_checkpointing=True,
        reasons={
            "resolution": "ai-toolkit's example train_lora_sd35_large_24gb",
            "learning_rate": "ai-toolkit's example",
            "rank": "ai-toolkit's example",
            "gradient_checkpointing": "ai-toolkit's example for 24 GB; kohya's guide",
        },
    ),
    licenses={
        "LicenseRef-Stability-Community": (
            "sd3",
            "sd35-medium",
            "sd35-large",
            "stabilityai/stable-diffusion-3-medium",
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "stabilityai/stable-diffusion-3.5-medium",
            "stabilityai/stable-diffusion-3.5-large",
            "stabilityai/stable-diffusion-3.5-large-turbo",
        )
    },
)
families.add(SD3.name, SD3)
