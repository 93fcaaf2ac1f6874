"""Defines canonical module names: `<component>.<path>`. Torch-free, because reading files needs no modules.

A text encoder's path always begins with `text_model.`, whether or not the installed transformers has that level
(version 5 dropped it from `CLIPTextModel`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LEVEL = "text_model."
"""The level of text encoders that transformers dropped."""
_BELOW_LEVEL = ("embeddings.", "encoder.layers.", "final_layer_norm")


def canonical_name(component: str, path: str) -> str:
    """Returns `<component>.<path>`, with the `text_model` level of text encoders that transformers dropped."""
    if component.startswith("text_encoder") and path.startswith(_BELOW_LEVEL):
        return f"{component}.{LEVEL}{path}"
    return f"{component}.{path}"


def near_names(name: str, names: Iterable[str]) -> str:
    """Returns the names most similar to `name`, for an error message."""
    candidates = list(names)
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.3)
    return f"{len(candidates)} modules, such as {', '.join(near or candidates[:3])}"
