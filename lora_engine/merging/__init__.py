"""Merging adapters: pure functions over deltas, never over factors of different adapters."""

from lora_engine.merging.concatenate import concatenate

__all__ = ["concatenate"]
