"""Factor keys of a weight that replaces the base's (ComfyUI's `set_weight`)."""

from __future__ import annotations

from lora_engine.formats.key_layout import LYCORIS, TableFactorKeys

LYCORIS.add(TableFactorKeys("replacement", {"value": "set_weight"}))
