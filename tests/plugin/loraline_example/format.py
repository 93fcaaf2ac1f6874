"""The file format `example-file`: its entry. Must not import torch."""

from lora_engine.catalog.formats import Format

FORMAT = Format(
    name="example-file",
    title="names that begin with `example.`",
    codec="loraline_example.codec:ExampleCodec",
    kinds=("lora", "example-scale"),
    file_name="example.safetensors",
)
