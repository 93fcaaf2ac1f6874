"""Reads and writes PEFT's `LoraConfig` as JSON, for the formats of diffusers and PEFT."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lora_engine.adapters import Delta, LoraDelta
from lora_engine.documents import parse_json, place_of_key
from lora_engine.errors import AdapterError

_T = TypeVar("_T")
CONFIG = "lora_adapter_metadata"
"""Header entry in which diffusers stores the `LoraConfig` of each component."""
HEADER_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
"""Header entries with the alpha of all modules, in files without alpha tensors."""
_MAX_NAMES = 10_000
"""Names in a list, each of which is compared with each module."""
_TRUTH = ("true or false", lambda value: isinstance(value, bool))
_TEXT = ("text", lambda value: isinstance(value, str))
_MAPPING = ("an object of module names to numbers", lambda value: isinstance(value, dict))
_SETTINGS: Mapping[str, tuple[str, Callable[[Any], bool] | None]] = {
    **dict.fromkeys(("peft_type", "peft_version"), _TEXT),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "coft", "use_cayley_neumann"), _TRUTH),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _MAPPING),
    "feedforward_modules": (
        f"a list of up to {_MAX_NAMES} module names",
        lambda value: isinstance(value, str) or _is_list_of_text(value),
    ),
}
_DOT = re.compile(r"\.")
_PLAIN = re.compile(r"\^?(\w|-|\\?\.)+\$?")


def parse_config(text: str, where: str) -> dict[str, Any]:
    """Returns the parsed JSON object. Settings that Loraline reads have the right type or are null.

    Raises:
        AdapterError: The text is no JSON object, or a setting has a wrong type; names line and column.
    """
    remedy = "save or download the adapter again"
    config = parse_json(text, where, AdapterError, remedy=remedy)
    if not isinstance(config, dict):
        raise AdapterError("not a JSON object", where=where, remedy=remedy)
    for key, value in config.items():
        # In diffusers' header, the name of the component precedes the key.
        noun, is_valid = _SETTINGS.get(key.rpartition(".")[2], ("", None))
        if is_valid is not None and value is not None and not is_valid(value):
            place = place_of_key(text, where, key)
            raise AdapterError(f"{key} is {str(value)[:80]!r}", where=place, allowed=noun, remedy="fix the file")
        if isinstance(value, dict) and noun == _MAPPING[0]:
            config[key] = PatternTable(value)
    return config


class PatternTable(dict[str, Any]):
    """PEFT's numbers by pattern, indexed: a file may have as many patterns as modules, and each is looked up.

    Patterns must be plain names that match the end of a path. Other regular expressions are refused, because an
    untrusted one can run for an unlimited time.
    """

    @functools.cached_property
    def _orders(self) -> tuple[dict[str, int], int, list[Any]]:
        """Order of each plain pattern (those of whole paths with a leading `^`), of the first invalid one; values."""
        orders: dict[str, int] = {}
        invalid = len(self)
        for order, pattern in enumerate(self):
            if not _PLAIN.fullmatch(pattern):
                invalid = min(invalid, order)
            anchor = "^" if pattern.startswith("^") else ""
            orders.setdefault(anchor + pattern.removeprefix("^").removesuffix("$").replace("\\", ""), order)
        return orders, invalid, list(self.values())

    def find(self, path: str, default: Any, where: str) -> Any:
        """Returns the value of the first pattern that matches a module's path.

        Raises:
            AdapterError: A pattern before it is no plain name.
        """
        orders, invalid, values = self._orders
        ends = (path[place:] for place in (0, *(match.end() for match in _DOT.finditer(path))))
        found = min((orders[name] for name in (f"^{path}", *ends) if name in orders), default=len(values))
        if invalid < found:
            raise AdapterError(
                f"the pattern {list(self)[invalid]!r} is no plain module name",
                where=where,
                allowed="module names, optionally with ^ before them",
                remedy="list the module names in the file",
            )
        return values[found] if found < len(values) else default


def header_alpha(metadata: Mapping[str, str]) -> float | None:
    """Returns the alpha in plain entries of a file's header, None if there is none.

    Raises:
        AdapterError: An entry is no finite number, or two entries disagree.
    """
    alphas: dict[str, float] = {}
    for key in HEADER_ALPHAS:
        try:
            alphas |= {key: float(metadata[key])} if key in metadata else {}
        except ValueError:
            alphas[key] = math.nan
    if len(set(alphas.values())) > 1 or not all(map(math.isfinite, alphas.values())):
        raise AdapterError(
            "the header's alpha is " + " and ".join(f"{metadata[key]!r} ({key!r})" for key in alphas),
            where=f"metadata {next(iter(alphas))!r}",
            allowed="one finite number",
            remedy="fix the header, or store alpha as a tensor for each module",
        )
    return next(iter(alphas.values()), None)


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_NAMES and all(isinstance(name, str) for name in value)


def alpha_of(
    config: Mapping[str, Any], path: str, rank: int | None, where: str, key: str = "lora_alpha"
) -> float | None:
    """Returns a module's alpha such that `alpha / rank` is PEFT's scale (including rsLoRA); None if not configured.

    Raises:
        AdapterError: A value is no number, or a pattern is no plain name.
    """
    alpha = number_of(config, path, where, key, "alpha_pattern")
    scale = math.sqrt(rank) if config.get("use_rslora") and rank else 1.0
    return None if alpha is None else alpha * scale


def number_of(config: Mapping[str, Any], path: str, where: str, key: str, pattern_key: str) -> float | None:
    """Returns a module's number in a configuration: by the first matching pattern, else by `key`; or None.

    Raises:
        AdapterError: A value is no number, or a pattern is no plain name.
    """
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, Mapping):
        problem = f"{pattern_key} is not a JSON object"
        raise AdapterError(problem, where=where, allowed="an object of module names to numbers", remedy="fix the file")
    table = patterns if isinstance(patterns, PatternTable) else PatternTable(patterns)
    number = table.find(path, config.get(key), where)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        noun = pattern_key.partition("_")[0]
        raise AdapterError(f"{noun} is {number!r}", where=where, allowed="a finite number", remedy="fix the file")
    return float(number)


def lora_config(modules: Mapping[str, Delta]) -> dict[str, Any]:
    """Returns the configuration that gives each of one component's modules (by path) its rank and alpha."""
    ranks = {path: (delta.rank or 0, delta.alpha or 0.0) for path, delta in modules.items()}
    has_bias = any(isinstance(delta, LoraDelta) and delta.bias is not None for delta in modules.values())
    return {
        **ranks_and_alphas(ranks, "lora_alpha"),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "use_dora": any(delta.kind == "dora" for delta in modules.values()),
        "use_rslora": False,
        **({"lora_bias": True} if has_bias else {}),
    }


def ranks_and_alphas(modules: Mapping[str, tuple[int, float]], alpha_key: str) -> dict[str, Any]:
    """Returns the most common rank and alpha, patterns for the modules (by path) that differ, and the targets."""
    ranks = {path: rank for path, (rank, _) in modules.items()}
    alphas = {path: _number(alpha) for path, (_, alpha) in modules.items()}
    rank, alpha = _most_common(list(ranks.values())), _most_common(list(alphas.values()))
    return {
        "alpha_pattern": {_exact(path): value for path, value in alphas.items() if value != alpha},
        alpha_key: alpha,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {_exact(path): value for path, value in ranks.items() if value != rank},
        "target_modules": sorted(modules),
    }


def check_one_kind(modules: Mapping[str, Delta], component: str) -> None:
    """Raises an error if the modules of a component differ in kind: PEFT's settings (`use_dora`) apply to all.

    Raises:
        AdapterError: The modules are of several kinds.
    """
    counts = Counter(delta.kind for delta in modules.values())
    if len(counts) > 1:
        shown = ", ".join(f"{kind} ({count})" for kind, count in sorted(counts.items()))
        raise AdapterError(
            f"the modules of {component!r} are of several kinds: {shown}",
            where=component,
            allowed="one kind for all modules of a component, in PEFT's and diffusers' formats",
            remedy="choose another format, such as loraline or kohya",
        )


def _exact(path: str) -> str:
    return "^" + path.replace(".", r"\.")


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _most_common(values: Sequence[_T]) -> _T:
    return Counter(values).most_common(1)[0][0]
