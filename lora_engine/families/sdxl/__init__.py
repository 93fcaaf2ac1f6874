"""Stable Diffusion XL (Stability AI)."""

from __future__ import annotations

from lora_engine.families.block_names import UNET_BLOCKS
from lora_engine.families.family import Family, HeaderVersion, Pipeline, Unet, UnetLayout, families
from lora_engine.families.latent_colors import SDXL_COLORS
from lora_engine.families.sdxl.published import SDXL_BASE
from lora_engine.families.text_encoders import CLIP_G, CLIP_L
from lora_engine.families.training_defaults import TrainingDefaults

_COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipelines=(
        Pipeline("StableDiffusionXLPipeline", "lora_engine.families.sdxl.model:StableDiffusionXL", _COMPONENTS),
        Pipeline(
            "StableDiffusionXLInpaintPipeline",
            "lora_engine.families.sdxl.model:InpaintingXL",
            _COMPONENTS,
            variant="inpainting",
        ),
    ),
    published=(SDXL_BASE,),
    unet=Unet(
        UnetLayout(3, frozenset({2})),
        widths=(2048,),
        modules=("text_encoder_2.", "unet.add_embedding."),
        published="sdxl",
        original=True,
    ),
    text={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    header=r"sd_?xl.*",
    reads_framing=True,
    versions=(HeaderVersion("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),),
    blocks=UNET_BLOCKS,
    latent_colors=SDXL_COLORS,
    training=TrainingDefaults(
        resolution=1024,
        learning_rate=1e-4,
        rank=4,
        gradient_checkpointing=True,
        reasons={
            "resolution": "the size that the base generates",
            "learning_rate": "diffusers' example train_dreambooth_lora_sdxl",
            "rank": "default of diffusers' LoRA scripts",
            "gradient_checkpointing": "kohya's guide sdxl_train_network recommends it: less memory, slower",
        },
    ),
    licenses={
        "LicenseRef-CreativeML-OpenRAILpp-M-SDXL": (
            "sdxl",
            "stabilityai/stable-diffusion-xl-base-1.0",
            "stabilityai/stable-diffusion-xl-refiner-1.0",
            "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        ),
        "LicenseRef-Stability-NC-Research": ("stabilityai/sdxl-turbo",),
    },
)
families.add(SDXL.name, SDXL)
