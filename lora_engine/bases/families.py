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
        adapters: The family that its adapters belong to; empty for its own. The layers of an inpainting base are
            those of the base that it was made from, all but the first.
        optional: The sub-folders that it may lack: `model_index.json` then says null.
    """

    name: str
    pipelines: tuple[str, ...]
    components: tuple[str, ...]
    module: str
    adapters: str = ""
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", self.adapters or self.name)


families: Registry[Family] = Registry("base model family")

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
    """The family that covers a pipeline class, or None."""
    return next((family for family in families.values() if pipeline in family.pipelines), None)
