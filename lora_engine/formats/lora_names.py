"""How files spell the factors of LoRA."""

from __future__ import annotations

from lora_engine.formats.spelling import DIFFUSERS, LYCORIS, PEFT, TableSpelling

LYCORIS.add(
    TableSpelling(
        "lora",
        {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"},
        optional=("mid",),
    )
)
# The name of PEFT's adapter, where somebody saved the live model's names.
_LIVE = {"lora_A.default.weight": "down", "lora_B.default.weight": "up"}
PEFT.add(TableSpelling("lora", {"down": "lora_A.weight", "up": "lora_B.weight"}, aliases=_LIVE))
DIFFUSERS.add(
    TableSpelling(
        "lora",
        {"down": "lora_A.weight", "up": "lora_B.weight"},
        aliases={
            **_LIVE,
            "lora.down.weight": "down",
            "lora.up.weight": "up",
            "lora_linear_layer.down.weight": "down",
            "lora_linear_layer.up.weight": "up",
        },
    )
)
