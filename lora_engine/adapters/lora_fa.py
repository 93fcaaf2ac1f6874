"""LoRA-FA: LoRA with a frozen `down` (arXiv 2308.03303), which saves activation memory in training."""

from __future__ import annotations

from typing import ClassVar

from lora_engine.adapters.lora import LoraDelta


class LoraFaDelta(LoraDelta):
    """A LoRA with only `up` trained. Its export form is LoRA."""

    kind: ClassVar[str] = "lora-fa"
    frozen: ClassVar[frozenset[str]] = frozenset({"down", "mid"})

    def to_export(self) -> LoraDelta:
        """Returns a LoRA with the same factors."""
        return LoraDelta(self.down, self.up, self.alpha, self.mid, self.bias)
