"""Reads and writes adapter files of all formats; every format maps to the one canonical `Adapter`."""

from lora_engine.formats import transformers as transformers
from lora_engine.formats.card import Card
from lora_engine.formats.codec import Codec, codecs
from lora_engine.formats.embedding_files import embedding_forms, read_embeddings, write_embeddings
from lora_engine.formats.embeddings import Embedding
from lora_engine.formats.files import Bundle, detect_codec, inspect, read_adapter, read_bundle
from lora_engine.formats.safetensors_io import Limits, read_safetensors, write_safetensors
from lora_engine.formats.validate import validate_tensors
from lora_engine.formats.writing import write_adapter

__all__ = [
    "Bundle",
    "Card",
    "Codec",
    "Embedding",
    "Limits",
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
