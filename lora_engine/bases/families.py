"""Lists the families of base models: their pipelines, their components and their modules.

Torch-free: a family's module is imported when a base of it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_engine.registries import Registry


@dataclass(frozen=True)
class Family:
    """A family of base models.

    Attributes:
        name: Name in adapters, cards and error messages.
        pipelines: Its values of `_class_name` in `model_index.json`.
        components: The required subfolders.
        module: The module whose `load(source, device, dtype)` returns the `BaseModel`.
        adapters: The family of its adapters; empty for its own. An inpainting base has the layers of the base that it
            was trained from, except the first.
        optional: Subfolders that may be missing; their entry in `model_index.json` is then null.
    """

    name: str
    pipelines: tuple[str, ...]
    components: tuple[str, ...]
    module: str
    adapters: str = ""
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", self.adapters or self.name)


families: Registry[Family] = Registry("base model family", entry=Family, group="loraline.families")

_SD = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
_SDXL = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
_TWO_TEXTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")

for _family in (
    Family(
        name="sd",
        pipelines=("StableDiffusionPipeline",),
        components=_SD,
        module="lora_engine.bases.sd",
    ),
    Family(
        name="sdxl",
        pipelines=("StableDiffusionXLPipeline",),
        components=_SDXL,
        module="lora_engine.bases.sdxl",
    ),
    Family(
        name="sd-inpainting",
        pipelines=("StableDiffusionInpaintPipeline",),
        components=_SD,
        module="lora_engine.bases.inpainting",
        adapters="sd",
    ),
    Family(
        name="sdxl-inpainting",
        pipelines=("StableDiffusionXLInpaintPipeline",),
        components=_SDXL,
        module="lora_engine.bases.inpainting",
        adapters="sdxl",
    ),
    Family(
        name="sd3",
        pipelines=("StableDiffusion3Pipeline",),
        components=(*_TWO_TEXTS, "text_encoder_3", "tokenizer_3"),
        module="lora_engine.bases.sd3",
        optional=("text_encoder_3", "tokenizer_3"),
    ),
    Family(name="flux", pipelines=("FluxPipeline",), components=_TWO_TEXTS, module="lora_engine.bases.flux"),
):
    families.add(_family.name, _family)


def family_of_pipeline(pipeline: str) -> Family | None:
    """Returns the family of a pipeline class; None if there is none."""
    return next((family for family in families.values() if pipeline in family.pipelines), None)
