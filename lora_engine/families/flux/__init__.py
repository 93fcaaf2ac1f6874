"""FLUX.1 (Black Forest Labs)."""

from __future__ import annotations

from lora_engine.families.family import Family, HeaderVersion, Pipeline, Size, Targets, families
from lora_engine.families.flux.blocks import FLUX_BLOCKS
from lora_engine.families.flux.names import FLUX_NAMES, XLABS_NAMES, swaps_halves
from lora_engine.families.flux.published import FLUX_DEV, FLUX_SCHNELL
from lora_engine.families.latent_colors import FLUX_COLORS
from lora_engine.families.text_encoders import CLIP_L, T5_TEXT, T5_XXL
from lora_engine.families.training_defaults import TrainingDefaults

_COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")

FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipelines=(Pipeline("FluxPipeline", "lora_engine.families.flux.model:Flux", _COMPONENTS),),
    published=(FLUX_DEV, FLUX_SCHNELL),
    names=FLUX_NAMES,
    other_names={"xlabs": XLABS_NAMES},
    sizes=(Size("FLUX.1", {"transformer_blocks": 19, "single_transformer_blocks": 38}, {"w": 3072}),),
    swapped=swaps_halves,
    text={"text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    header=r"flux(_?(1|dev|schnell).*)?",
    versions=(HeaderVersion("flux1", "flux-1-dev/lora"),),
    targets=Targets(
        # A single block has one output layer for attention and feed-forward, `proj_out`.
        feed_forward=rf"{Targets.feed_forward}|.*\.single_transformer_blocks\.\d+\.proj_(mlp|out)",
        text=rf"{Targets.text}|text_encoder.*\.({T5_TEXT})",
    ),
    blocks=FLUX_BLOCKS,
    latent_colors=FLUX_COLORS,
    training=TrainingDefaults(
        resolution=1024,
        learning_rate=1e-4,
        rank=16,
        gradient_checkpointing=True,
        reasons={
            "resolution": "largest of ai-toolkit's example train_lora_flux_24gb; 512 needs less memory",
            "learning_rate": "ai-toolkit's example",
            "rank": "ai-toolkit's example",
            "gradient_checkpointing": "ai-toolkit's example for 24 GB; kohya's guide",
        },
    ),
    # There is a free and a non-free release; if only the family is known, the stricter license applies.
    licenses={
        "LicenseRef-FLUX-1-dev-NC": (
            "flux",
            "black-forest-labs/FLUX.1-dev",
            "black-forest-labs/FLUX.1-Fill-dev",
            "black-forest-labs/FLUX.1-Depth-dev",
            "black-forest-labs/FLUX.1-Canny-dev",
            "black-forest-labs/FLUX.1-Redux-dev",
            "black-forest-labs/FLUX.1-Kontext-dev",
        ),
        "Apache-2.0": ("flux-schnell", "black-forest-labs/FLUX.1-schnell"),
    },
)
families.add(FLUX.name, FLUX)
