"""LoRA-FA: LoRA whose `down` stays as it began (arXiv 2308.03303), so that training keeps less in memory."""

from __future__ import annotations

from typing import ClassVar

from lora_engine.adapters.delta import kinds
from lora_engine.adapters.lora import LoraDelta


class LoraFaDelta(LoraDelta):
    """A LoRA of which only `up` is trained; for training alone, in files it is LoRA."""

    kind: ClassVar[str] = "lora-fa"
    frozen: ClassVar[frozenset[str]] = frozenset({"down", "mid"})

    def to_export(self) -> LoraDelta:
        """The LoRA of the same factors."""
        return LoraDelta(self.down, self.up, self.alpha, self.mid, self.bias)


kinds.add(LoraFaDelta.kind, LoraFaDelta)
