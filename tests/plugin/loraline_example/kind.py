"""The adapter kind `example-scale`: its options and its entry. Must not import torch."""

from typing import Literal

from lora_engine.catalog.kinds import Kind, KindSpec


class Scale(KindSpec):
    """A trained scale per output."""

    name: Literal["example-scale"] = "example-scale"


KIND = Kind(
    name="example-scale",
    title="scale per output",
    delta="loraline_example.scale:ScaleDelta",
    spec=Scale,
    keys={"LyCORIS": {"scale": "example_rows"}},
)
