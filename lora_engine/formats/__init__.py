"""Adapter files of all formats, over the one canonical adapter."""

from lora_engine.formats import lora_names as lora_names  # a new kind adds its spellings with a line like this
from lora_engine.formats import native as native  # and a new format its codec; detection asks in this order

from lora_engine.formats import kohya as kohya  # isort: skip
from lora_engine.formats import comfyui as comfyui  # isort: skip
from lora_engine.formats import diffusers as diffusers  # isort: skip
from lora_engine.formats import peft as peft  # isort: skip
from lora_engine.formats.card import Card
from lora_engine.formats.codec import Codec, codecs
from lora_engine.formats.files import detect_codec, inspect, read_adapter, write_adapter
from lora_engine.formats.safetensors_io import Limits, read_safetensors, write_safetensors
from lora_engine.formats.validate import validate_tensors

__all__ = [
    "Card",
    "Codec",
    "Limits",
    "codecs",
    "detect_codec",
    "inspect",
    "read_adapter",
    "read_safetensors",
    "validate_tensors",
    "write_adapter",
    "write_safetensors",
]
