"""Writes plain data as YAML that the reader of this package, and those of YAML 1.1, read as the same data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lora_engine.documents.yaml_source import SCALAR_RESOLVERS


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which is a number in YAML 1.2, such as 1e-4, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Returns True: every value is written out."""
        return True


for _tag, _pattern, _first in SCALAR_RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def to_yaml(data: Mapping[str, Any]) -> str:
    """Returns plain data as a YAML document, in the order of the data; the last character is a line break."""
    return str(yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
