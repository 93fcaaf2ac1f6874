"""Reads the factors of files whose module names no format has; a base of such names is unknown."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_engine.adapters import Delta
from lora_engine.catalog.formats import FORMATS, Format
from lora_engine.errors import UnknownBaseError
from lora_engine.formats.codec import TensorCodec
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, LYCORIS_KEYS, KeyLayout


class UnknownNamesCodec(TensorCodec):
    """Any module names with the factors of LyCORIS or diffusers.

    It has no entry in `FORMATS`, because users do not name it and nothing is written in it.
    """

    format = Format("unknown", "module names of no known program", "", is_written=False)
    key_layout = KeyLayout("LyCORIS and diffusers", writes_alpha=True, also=(LYCORIS_KEYS, DIFFUSERS_KEYS))

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if every tensor is a factor, and some identify the kind."""
        return self.key_layout.matches(keys) and all(
            suffix is not None and module for _, module, suffix in self.key_layout.split(keys)
        )

    def resolve(
        self, raw: Mapping[str, Delta], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Raises an error.

        Raises:
            UnknownBaseError: Always; the names are of no known base.
        """
        raise UnknownBaseError(
            "unknown adapter format: no supported module naming matches",
            where=f"module {min(raw)!r}",
            allowed=", ".join(FORMATS),
            remedy="convert the adapter with the program that made it, or give the path of the right file",
        )
