"""How files spell a weight that replaces the base's (ComfyUI's `set_weight`)."""

from __future__ import annotations

from lora_engine.formats.spelling import LYCORIS, TableSpelling

LYCORIS.add(TableSpelling("replacement", {"value": "set_weight"}))
