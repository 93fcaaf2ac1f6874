"""Full checkpoints: an original single file (`.safetensors`, `.ckpt`) as a diffusers folder, and the way back.

Everything is copied tensor by tensor from file to file. Adapters and their formats live elsewhere.
"""

from lora_engine.checkpoints.convert import convert_checkpoint
from lora_engine.checkpoints.inspect import inspect_checkpoint, is_checkpoint
from lora_engine.checkpoints.names import TensorName, checkpoint_names, names_by_module, stored_name

__all__ = [
    "TensorName",
    "checkpoint_names",
    "convert_checkpoint",
    "inspect_checkpoint",
    "is_checkpoint",
    "names_by_module",
    "stored_name",
]
