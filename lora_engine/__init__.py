"""The engine: adapters, file formats, base models, training, merging, evaluation, inference.

    import lora_engine as le

    adapter = le.load("zorb.safetensors", base="sdxl")
    adapter.save("zorb-kohya.safetensors", format="kohya")
    with adapter.attached(pipe.unet, scale=0.8):
        image = pipe(prompt).images[0]
    merged = le.merge([a, b], weights=[0.7, 0.3], method="ties")

Names are imported when they are first used, so `import lora_engine` imports no torch. The engine knows no Prefect, no
MLflow and no registry.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lora_engine.exports import exports

# Must precede the first import of torch. By default, waiting OpenMP threads keep their core busy: with one other
# program on two cores, a forward pass took 28 s instead of 1.1 s. On an idle machine the difference is noise.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from lora_engine.adapters import Adapter, Attachment, Delta, collapse, create_adapter, kinds, module_shapes
    from lora_engine.bases.base import BaseModel, load_base
    from lora_engine.errors import AdapterError, BaseModelError, EngineError, SettingsError, TrainingError
    from lora_engine.formats import Card, Embedding, codecs, inspect, read_safetensors, write_safetensors
    from lora_engine.inference.generate import generate
    from lora_engine.library import LoadedAdapter, attach, load, merge, resize
    from lora_engine.merging.methods import METHODS
    from lora_engine.training.methods import methods
    from lora_engine.training.run import train
    from lora_engine.training.spec import TrainSettings

_MODULES = {
    "lora_engine.adapters": "Adapter Attachment Delta collapse create_adapter kinds module_shapes",
    "lora_engine.bases.base": "BaseModel load_base",
    "lora_engine.errors": "AdapterError BaseModelError EngineError SettingsError TrainingError",
    "lora_engine.formats": "Card Embedding codecs inspect read_safetensors write_safetensors",
    "lora_engine.inference.generate": "generate",
    "lora_engine.library": "LoadedAdapter attach load merge resize",
    "lora_engine.merging.methods": "METHODS",
    "lora_engine.training.methods": "methods",
    "lora_engine.training.run": "train",
    "lora_engine.training.spec": "TrainSettings",
}

__getattr__, __dir__ = exports(__name__, _MODULES)
__all__ = [
    "METHODS",
    "Adapter",
    "AdapterError",
    "Attachment",
    "BaseModel",
    "BaseModelError",
    "Card",
    "Delta",
    "Embedding",
    "EngineError",
    "LoadedAdapter",
    "SettingsError",
    "TrainSettings",
    "TrainingError",
    "attach",
    "codecs",
    "collapse",
    "create_adapter",
    "generate",
    "inspect",
    "kinds",
    "load",
    "load_base",
    "merge",
    "methods",
    "module_shapes",
    "read_safetensors",
    "resize",
    "train",
    "write_safetensors",
]
