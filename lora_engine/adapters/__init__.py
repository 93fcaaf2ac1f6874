"""Adapters in memory: delta kinds, and functions that attach, detach and collapse them. Knows no file format.

Names are imported when they are first used: reading a file needs the kinds that it has, and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_engine.exports import exports

if TYPE_CHECKING:
    from lora_engine.adapters.adapted import AdaptedLayer, innermost
    from lora_engine.adapters.adapter import Adapter
    from lora_engine.adapters.attachment import Attachment, attach, check_fit, collapse
    from lora_engine.adapters.boft import BoftDelta
    from lora_engine.adapters.creation import LayerSettings, create_adapter
    from lora_engine.adapters.delta import Delta, Issue, dense_forward, kinds, same_delta
    from lora_engine.adapters.dora import DoraDelta
    from lora_engine.adapters.full import FullDelta
    from lora_engine.adapters.glora import GloraDelta
    from lora_engine.adapters.ia3 import Ia3Delta, PeftIa3Delta
    from lora_engine.adapters.layer import LayerOp
    from lora_engine.adapters.loha import LohaDelta
    from lora_engine.adapters.lokr import LokrDelta
    from lora_engine.adapters.lokr_rows import LokrRowsDelta
    from lora_engine.adapters.lora import LoraDelta
    from lora_engine.adapters.module_names import canonical_name
    from lora_engine.adapters.oft import OftDelta
    from lora_engine.adapters.oft_parts import OftPartsDelta
    from lora_engine.adapters.peft_boft import PeftBoftDelta
    from lora_engine.adapters.peft_oft import PeftOftDelta
    from lora_engine.adapters.pissa import PissaDelta
    from lora_engine.adapters.replacement import ReplacementDelta
    from lora_engine.adapters.select import TARGET_PRESETS, select_modules
    from lora_engine.adapters.tree import DictTree, ModuleTree, adaptable_layers, as_tree, module_shapes

_MODULES = {
    "lora_engine.adapters.adapted": "AdaptedLayer innermost",
    "lora_engine.adapters.adapter": "Adapter",
    "lora_engine.adapters.attachment": "Attachment attach check_fit collapse",
    "lora_engine.adapters.boft": "BoftDelta",
    "lora_engine.adapters.creation": "LayerSettings create_adapter",
    "lora_engine.adapters.delta": "Delta Issue dense_forward kinds same_delta",
    "lora_engine.adapters.dora": "DoraDelta",
    "lora_engine.adapters.full": "FullDelta",
    "lora_engine.adapters.glora": "GloraDelta",
    "lora_engine.adapters.ia3": "Ia3Delta PeftIa3Delta",
    "lora_engine.adapters.layer": "LayerOp",
    "lora_engine.adapters.loha": "LohaDelta",
    "lora_engine.adapters.lokr": "LokrDelta",
    "lora_engine.adapters.lokr_rows": "LokrRowsDelta",
    "lora_engine.adapters.lora": "LoraDelta",
    "lora_engine.adapters.module_names": "canonical_name",
    "lora_engine.adapters.oft": "OftDelta",
    "lora_engine.adapters.oft_parts": "OftPartsDelta",
    "lora_engine.adapters.peft_boft": "PeftBoftDelta",
    "lora_engine.adapters.peft_oft": "PeftOftDelta",
    "lora_engine.adapters.pissa": "PissaDelta",
    "lora_engine.adapters.replacement": "ReplacementDelta",
    "lora_engine.adapters.select": "TARGET_PRESETS select_modules",
    "lora_engine.adapters.tree": "DictTree ModuleTree adaptable_layers as_tree module_shapes",
}

__getattr__, __dir__ = exports(__name__, _MODULES)
__all__ = [
    "TARGET_PRESETS",
    "AdaptedLayer",
    "Adapter",
    "Attachment",
    "BoftDelta",
    "Delta",
    "DictTree",
    "DoraDelta",
    "FullDelta",
    "GloraDelta",
    "Ia3Delta",
    "Issue",
    "LayerOp",
    "LayerSettings",
    "LohaDelta",
    "LokrDelta",
    "LokrRowsDelta",
    "LoraDelta",
    "ModuleTree",
    "OftDelta",
    "OftPartsDelta",
    "PeftBoftDelta",
    "PeftIa3Delta",
    "PeftOftDelta",
    "PissaDelta",
    "ReplacementDelta",
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
