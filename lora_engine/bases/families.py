"""The families of base models: which pipelines they cover, which parts they need, which module computes them.

Torch-free: a family's module is imported when a base of it is loaded. No weights and no maths live here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_engine.registries import Registry


@dataclass(frozen=True)
class Family:
    """What is known about a family before any of its weights are read.

    Attributes:
        name: Its name in adapters, cards and error messages.
        pipelines: The values of `_class_name` in `model_index.json` that belong to it.
        components: The sub-folders that it needs.
        module: The module whose `load(source, device, dtype)` gives the `BaseModel`.
    """

    name: str
    pipelines: tuple[str, ...]
    components: tuple[str, ...]
    module: str


families: Registry[Family] = Registry("base model family")

for _family in (
    Family(
        name="sd",
        pipelines=("StableDiffusionPipeline",),
        components=("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
        module="lora_engine.bases.sd",
    ),
    Family(
        name="sdxl",
        pipelines=("StableDiffusionXLPipeline",),
        components=("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"),
        module="lora_engine.bases.sdxl",
    ),
):
    families.add(_family.name, _family)


def family_of_pipeline(pipeline: str) -> Family | None:
    """The family that covers a pipeline class, or None."""
    return next((family for family in families.values() if pipeline in family.pipelines), None)
