"""The codec of the format `example-file`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_engine.adapters import Delta
from lora_engine.formats.codec import TensorCodec
from lora_engine.formats.key_layout import LYCORIS_KEYS
from loraline_example.format import FORMAT

PREFIX = "example."


class ExampleCodec(TensorCodec):
    """`example.unet.mid_block.attentions.0.proj_in.lora_down.weight`."""

    format = FORMAT
    key_layout = LYCORIS_KEYS.limited("example", FORMAT.kinds)

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names have the prefix."""
        return all(key.startswith(PREFIX) for key in keys)

    def raw_name(self, name: str, family: str) -> str:
        """Returns the name of a module in the file."""
        return f"{PREFIX}{name}"

    def resolve(
        self, raw: Mapping[str, Delta], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Returns the canonical names."""
        return {name: name.removeprefix(PREFIX) for name in raw}
