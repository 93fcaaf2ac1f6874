"""Rewrites whole models from file to file with little memory: fuses and unfuses adapters, merges checkpoints.

No model is built or loaded. `adapters` defines the deltas, and `checkpoints` the layouts of files.
"""

from lora_engine.streaming.arithmetic import CHECKPOINT_METHODS
from lora_engine.streaming.extract import ExtractReport, extract
from lora_engine.streaming.fuse import FuseReport, fuse, unfuse
from lora_engine.streaming.merge import CheckpointReport, merge_checkpoints
from lora_engine.streaming.model import StoredModel, open_model
from lora_engine.streaming.plain import write_plain

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
    "write_plain",
]
