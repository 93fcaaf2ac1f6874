"""Reads YAML, JSON, TOML and CSV that users and other programs wrote; every refusal names file, line and column.

The only readers of such text: depth, size and numbers are bounded, a duplicate key is an error, text is valid Unicode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_engine.exports import exports

if TYPE_CHECKING:
    from lora_engine.documents.csv_source import TableRow, read_table
    from lora_engine.documents.json_source import decode, parse_json, place_of_key, read_json_object
    from lora_engine.documents.toml_source import read_toml
    from lora_engine.documents.yaml_source import Document, Where, parse_value, read_document
    from lora_engine.documents.yaml_text import to_yaml

_MODULES = {
    "lora_engine.documents.csv_source": "TableRow read_table",
    "lora_engine.documents.json_source": "decode parse_json place_of_key read_json_object",
    "lora_engine.documents.toml_source": "read_toml",
    "lora_engine.documents.yaml_source": "Document Where parse_value read_document",
    "lora_engine.documents.yaml_text": "to_yaml",
}

__getattr__, __dir__ = exports(__name__, _MODULES)

__all__ = [
    "Document",
    "TableRow",
    "Where",
    "decode",
    "parse_json",
    "parse_value",
    "place_of_key",
    "read_document",
    "read_json_object",
    "read_table",
    "read_toml",
    "to_yaml",
]
