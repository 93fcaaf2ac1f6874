"""Z-Image and Z-Image-Turbo (Alibaba)."""

from __future__ import annotations

from lora_engine.families.family import Family, HeaderVersion, Pipeline, Size, Targets, Written, families
from lora_engine.families.latent_colors import FLUX_COLORS
from lora_engine.families.training_defaults import TrainingDefaults
from lora_engine.families.z_image.names import QWEN3, Z_IMAGE_NAMES
from lora_engine.families.z_image.published import Z_IMAGE_BASE

Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    pipelines=(
        Pipeline(
            "ZImagePipeline",
            "lora_engine.families.z_image.model:ZImage",
            ("scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
        ),
    ),
    published=(Z_IMAGE_BASE,),
    names=Z_IMAGE_NAMES,
    sizes=(Size("Z-Image", {"layers": 30}, {"w": 3840, "f": 10240}, {"noise_refiner": 2, "context_refiner": 2}),),
    header=r"z_?image.*",
    text={"text_encoder": QWEN3},
    # musubi-tuner, ai-toolkit and OneTrainer write diffusers' names.
    written={
        "kohya": Written("lora_unet_", original=False),
        "aitoolkit": Written("diffusion_model.", original=False),
        "onetrainer": Written("transformer.", original=False),
    },
    versions=(HeaderVersion("z_image", "Z-Image/lora"),),
    # As in other trainers, presets of layers leave out the refiners, which see only the image or only the text.
    targets=Targets(
        blocks=r"transformer\.(layers|noise_refiner|context_refiner)\..*",
        attention=r"transformer\.layers\.\d+\.attention\.(to_[qkv]|to_out\.0)",
        feed_forward=r"transformer\.layers\.\d+\.feed_forward\.w[123]",
        text=r"text_encoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    ),
    latent_colors=FLUX_COLORS,
    training=TrainingDefaults(
        resolution=1024,
        learning_rate=1e-4,
        rank=4,
        gradient_checkpointing=True,
        reasons={
            "resolution": "diffusers' example train_dreambooth_lora_z_image",
            "learning_rate": "diffusers' example train_dreambooth_lora_z_image",
            "rank": "default of diffusers' LoRA scripts",
            "gradient_checkpointing": "diffusers' example train_dreambooth_lora_z_image",
        },
    ),
    licenses={"Apache-2.0": ("z-image", "Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo")},
)
families.add(Z_IMAGE.name, Z_IMAGE)
