"""The families of base models. Each is one folder or file, imported by one line below.

`family` defines what a family declares, `proof` tells families apart. Importing this package imports no torch.
"""

from lora_engine.families.family import Architecture, ComponentConfig, Family, Pipeline, families
from lora_engine.registries import Registry

# A new family adds a line here. Messages list the families in this order.
from lora_engine.families import sd as sd  # isort: skip
from lora_engine.families import sdxl as sdxl  # isort: skip
from lora_engine.families import sd3 as sd3  # isort: skip
from lora_engine.families import flux as flux  # isort: skip
from lora_engine.families import z_image as z_image  # isort: skip
from lora_engine.families import flux2 as flux2  # isort: skip
from lora_engine.families import chroma as chroma  # isort: skip
from lora_engine.families import hunyuan as hunyuan  # isort: skip
from lora_engine.families import qwen_image as qwen_image  # isort: skip
from lora_engine.families import krea2 as krea2  # isort: skip
from lora_engine.families import anima as anima  # isort: skip
from lora_engine.families import lumina2 as lumina2  # isort: skip
from lora_engine.families import wan as wan  # isort: skip
from lora_engine.families import ltx as ltx  # isort: skip
from lora_engine.families import flux_like as flux_like  # isort: skip
from lora_engine.families import other_transformers as other_transformers  # isort: skip


def _add_published() -> None:
    for architecture in (entry for family in families.values() for entry in family.published):
        published.add(architecture.name, architecture)


published: Registry[Architecture] = Registry("published architecture", source=_add_published)


def find_pipeline(name: str) -> tuple[Family, Pipeline] | None:
    """Returns a pipeline and its family by the class in `model_index.json`; None if it cannot be loaded."""
    pairs = ((family, pipeline) for family in families.values() for pipeline in family.pipelines)
    return next((pair for pair in pairs if pair[1].name == name), None)


__all__ = ["Architecture", "ComponentConfig", "Family", "Pipeline", "families", "find_pipeline", "published"]
