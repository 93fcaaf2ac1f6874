"""Stable Diffusion 1.x and 2.x, including the embedded base, which is a small one."""

from __future__ import annotations

from lora_engine.families.block_names import UNET_BLOCKS
from lora_engine.families.family import Family, HeaderVersion, Pipeline, Unet, UnetLayout, families
from lora_engine.families.latent_colors import SD_COLORS
from lora_engine.families.sd.published import SD2, SD2_BASE, SD15
from lora_engine.families.text_encoders import CLIP_L
from lora_engine.families.training_defaults import TrainingDefaults

_COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")

SD = Family(
    name="sd",
    title="Stable Diffusion 1 and 2",
    pipelines=(
        Pipeline("StableDiffusionPipeline", "lora_engine.families.sd.model:StableDiffusion", _COMPONENTS),
        Pipeline(
            "StableDiffusionInpaintPipeline",
            "lora_engine.families.sd.inpainting:InpaintingBase",
            _COMPONENTS,
            variant="inpainting",
        ),
    ),
    published=(SD15, SD2, SD2_BASE),
    # SD 2 has all modules of SD 1 under the same names, and more text encoder layers.
    unet=Unet(UnetLayout(4, frozenset({0})), widths=(768, 1024), modules=(), published="sd2"),
    text={"text_encoder": CLIP_L},
    header=r"sd_v?[12].*",
    versions=(
        HeaderVersion("sd_v2_v", "stable-diffusion-v2-768-v/lora", "768x768", width=1024, prediction="v"),
        HeaderVersion("sd_v2", "stable-diffusion-v2-512/lora", "512x512", width=1024),
        HeaderVersion("sd_v1", "stable-diffusion-v1/lora", "512x512"),
    ),
    blocks=UNET_BLOCKS,
    latent_colors=SD_COLORS,
    training=TrainingDefaults(
        resolution=512,
        learning_rate=1e-4,
        rank=4,
        reasons={
            "resolution": "the size that the base generates",
            "learning_rate": "diffusers' example train_text_to_image_lora",
            "rank": "default of diffusers' LoRA scripts",
            "gradient_checkpointing": "off in diffusers' example train_text_to_image_lora",
        },
    ),
    licenses={
        "LicenseRef-CreativeML-OpenRAIL-M": (
            "sd15",
            "CompVis/stable-diffusion-v1-1",
            "CompVis/stable-diffusion-v1-2",
            "CompVis/stable-diffusion-v1-3",
            "CompVis/stable-diffusion-v1-4",
            "runwayml/stable-diffusion-v1-5",
            "runwayml/stable-diffusion-inpainting",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-inpainting",
        ),
        "LicenseRef-CreativeML-OpenRAILpp-M": (
            "sd2",
            "sd2-base",
            "stabilityai/stable-diffusion-2",
            "stabilityai/stable-diffusion-2-base",
            "stabilityai/stable-diffusion-2-1",
            "stabilityai/stable-diffusion-2-1-base",
            "stabilityai/stable-diffusion-2-inpainting",
        ),
        "LicenseRef-Stability-NC-Research": ("stabilityai/sd-turbo",),
    },
)
families.add(SD.name, SD)
