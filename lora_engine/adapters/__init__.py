"""Adapters in memory: kinds of deltas, and how they go on a base and come off. No file format lives here."""

from lora_engine.adapters import lora as lora  # registers its kind; a new kind adds a line like this
from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.attach import Attachment, LayerSettings, attach, check_fit, collapse, create_adapter
from lora_engine.adapters.delta import Delta, Fault, dense_forward, kinds, same_delta
from lora_engine.adapters.layer import AdaptedLayer, LayerOp, innermost
from lora_engine.adapters.lora import LoraDelta
from lora_engine.adapters.select import PRESETS, select_modules
from lora_engine.adapters.tree import DictTree, ModuleTree, adaptable_layers, as_tree, canonical_name, module_shapes

__all__ = [
    "PRESETS",
    "AdaptedLayer",
    "Adapter",
    "Attachment",
    "Delta",
    "DictTree",
    "Fault",
    "LayerOp",
    "LayerSettings",
    "LoraDelta",
    "ModuleTree",
    "adaptable_layers",
    "as_tree",
    "attach",
    "canonical_name",
    "check_fit",
    "collapse",
    "create_adapter",
    "dense_forward",
    "innermost",
    "kinds",
    "module_shapes",
    "same_delta",
    "select_modules",
]
