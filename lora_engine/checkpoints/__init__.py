"""Converts full checkpoints between an original single file (`.safetensors`, `.ckpt`) and a diffusers folder.

Tensors are copied one by one from file to file. `formats` handles adapters.
"""

from lora_engine.checkpoints.convert import convert_checkpoint
from lora_engine.checkpoints.convert_transformer import is_original_transformer
from lora_engine.checkpoints.inspect import inspect_checkpoint, is_checkpoint
from lora_engine.checkpoints.names import TensorName, checkpoint_names, names_by_module, stored_name

__all__ = [
    "TensorName",
    "checkpoint_names",
    "convert_checkpoint",
    "inspect_checkpoint",
    "is_checkpoint",
    "is_original_transformer",
    "names_by_module",
    "stored_name",
]
