"""Adapter files of all formats, over the one canonical adapter."""

from lora_engine.formats import lora_names as lora_names  # a new kind adds its spellings with a line like this

from lora_engine.formats import loha_names as loha_names  # isort: skip
from lora_engine.formats import lokr_names as lokr_names  # isort: skip
from lora_engine.formats import dora_names as dora_names  # isort: skip  # after the kinds that it wraps
from lora_engine.formats import full_names as full_names
from lora_engine.formats import ia3_names as ia3_names
from lora_engine.formats import oft_names as oft_names
from lora_engine.formats import replacement_names as replacement_names

from lora_engine.formats import fused_kinds as fused_kinds  # isort: skip
from lora_engine.formats import flux as flux  # isort: skip  # a new family of transformers adds its names
from lora_engine.formats import sd3 as sd3  # isort: skip
from lora_engine.formats import kohya as kohya  # isort: skip  # and a new format its codec; detection asks in this order
from lora_engine.formats import bfl as bfl  # isort: skip
from lora_engine.formats import kohya_like as kohya_like  # isort: skip
from lora_engine.formats import comfyui as comfyui  # isort: skip
from lora_engine.formats import native as native  # isort: skip
from lora_engine.formats import diffusers as diffusers  # isort: skip
from lora_engine.formats import peft as peft  # isort: skip
from lora_engine.formats import cloneofsimo as cloneofsimo  # isort: skip
from lora_engine.formats.approximate import Approximation, approximate
from lora_engine.formats.card import Card
from lora_engine.formats.codec import Codec, codecs
from lora_engine.formats.embedding_files import embedding_forms, read_embeddings, write_embeddings
from lora_engine.formats.embeddings import Embedding
from lora_engine.formats.files import Bundle, detect_codec, inspect, read_adapter, read_bundle, write_adapter
from lora_engine.formats.safetensors_io import Limits, read_safetensors, write_safetensors
from lora_engine.formats.validate import validate_tensors

__all__ = [
    "Approximation",
    "Bundle",
    "Card",
    "Codec",
    "Embedding",
    "Limits",
    "approximate",
    "codecs",
    "detect_codec",
    "embedding_forms",
    "inspect",
    "read_adapter",
    "read_bundle",
    "read_embeddings",
    "read_safetensors",
    "validate_tensors",
    "write_adapter",
    "write_embeddings",
    "write_safetensors",
]
