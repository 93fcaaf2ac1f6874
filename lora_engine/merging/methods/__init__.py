"""Merge methods by name, one file each: options, function and title. Importing them imports no torch.

To add a method, add a file with an entry; the option `method`, help texts, the JSON Schema and the laws follow from it.
"""

from lora_engine.merging.methods.method import METHODS, Combination, Elementwise, MergeMethod, parse_options

__all__ = ["METHODS", "Combination", "Elementwise", "MergeMethod", "parse_options"]
