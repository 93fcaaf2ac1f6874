"""The base family `example_net`, which is only recognized. Must not import torch."""

from lora_engine.families.family import Family, Size
from lora_engine.families.names import Blocks, NameTable

FAMILY = Family(
    name="example_net",
    title="Example Net",
    names=NameTable(
        (
            Blocks(
                "stages",
                "example_blocks",
                {"mix.qkv": ("mix.to_q", "mix.to_k", "mix.to_v"), "mix.out": ("mix.to_out",)},
                dict.fromkeys(("mix.to_q", "mix.to_k", "mix.to_v", "mix.to_out"), "w w"),
            ),
        )
    ),
    sizes=(Size("Example Net 1", {"example_blocks": 20}, {"w": 640}),),
    header=r"example_net.*",
)
