"""How files spell the factors of LoRA."""

from __future__ import annotations

from lora_engine.formats.spelling import LYCORIS, PEFT, TableSpelling

LYCORIS.add(
    TableSpelling(
        "lora",
        {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"},
        optional=("mid",),
    )
)
PEFT.add(
    TableSpelling(
        "lora",
        {"down": "lora_A.weight", "up": "lora_B.weight"},
        aliases={
            "lora_A.default.weight": "down",
            "lora_B.default.weight": "up",
            "lora.down.weight": "down",
            "lora.up.weight": "up",
            "lora_linear_layer.down.weight": "down",
            "lora_linear_layer.up.weight": "up",
        },
    )
)
