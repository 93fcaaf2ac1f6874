"""PEFT's `LoraConfig` as JSON: alpha and rank by component, with patterns. Read and written for diffusers and PEFT."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError

T = TypeVar("T")
_PLAIN = re.compile(r"\^?(\w|-|\\?\.)+\$?")


def parse_config(text: str, where: str) -> dict[str, Any]:
    """The JSON object.

    Raises:
        AdapterError: It is none.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"no JSON: {error}", where=where, remedy="save or download the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError("no JSON object", where=where, remedy="save or download the adapter again")
    return config


def alpha_of(config: Mapping[str, Any], path: str, rank: int | None, where: str) -> float | None:
    """Alpha of a module by a configuration, so that `alpha / rank` is PEFT's scale (rsLoRA included); None: unsaid.

    Patterns are taken as plain names that match the end of a path; anything cleverer is refused, because a regular
    expression from a stranger's file can keep a reader busy for ever.

    Raises:
        AdapterError: A value that is no number, or a pattern that is no plain name.
    """
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if _matches(pattern, path, where):
            alpha = value
            break
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"alpha is {alpha!r}", where=where, allowed="a finite number", remedy="mend the file")
    scale = math.sqrt(rank) if config.get("use_rslora") and rank else 1.0
    return float(alpha) * scale


def _matches(pattern: str, path: str, where: str) -> bool:
    if not _PLAIN.fullmatch(pattern):
        raise AdapterError(
            f"the pattern {pattern!r} is no plain module name",
            where=where,
            allowed="module names, perhaps with ^ before them",
            remedy="write the module names out in the file",
        )
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
    return path == plain or (not pattern.startswith("^") and path.endswith(f".{plain}"))


def lora_config(modules: Mapping[str, Delta]) -> dict[str, Any]:
    """The configuration that gives each of one component's modules (by path) its rank and alpha."""
    ranks = {path: delta.rank or 0 for path, delta in modules.items()}
    alphas = {path: _number(delta.alpha or 0.0) for path, delta in modules.items()}
    rank, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    return {
        "alpha_pattern": {_exact(path): value for path, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_exact(path): value for path, value in ranks.items() if value != rank},
        "target_modules": sorted(modules),
        "use_dora": False,
        "use_rslora": False,
    }


def _exact(path: str) -> str:
    return "^" + path.replace(".", r"\.")


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _commonest(values: Sequence[T]) -> T:
    return Counter(values).most_common(1)[0][0]
