"""Whole models rewritten from file to file with little memory: adapters fused in and taken out, checkpoints merged.

No model is built and none is held in memory; what an adapter means is said in `adapters`, how files are laid out in
`checkpoints`.
"""

from lora_engine.streaming.arithmetic import CHECKPOINT_METHODS
from lora_engine.streaming.extract import ExtractReport, extract
from lora_engine.streaming.fuse import FuseReport, fuse, unfuse
from lora_engine.streaming.merge import CheckpointReport, merge_checkpoints
from lora_engine.streaming.model import StoredModel, open_model

__all__ = [
    "CHECKPOINT_METHODS",
    "CheckpointReport",
    "ExtractReport",
    "FuseReport",
    "StoredModel",
    "extract",
    "fuse",
    "merge_checkpoints",
    "open_model",
    "unfuse",
]
