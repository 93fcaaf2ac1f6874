"""Groups the tensors of a file by module, by the keys of a `KeyLayout`; an unknown or incomplete one is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import ALPHA, FactorKeys, KeyLayout
from lora_engine.formats.validate import check_delta

if TYPE_CHECKING:
    from torch import Tensor

_UNSUPPORTED = {
    r"[qp]_layer\.weight|lambda_layer": "LyCORIS' T-LoRA",
    r"vera_(lambda_[bd]|[AB].*)": "PEFT's VeRA",
    r"lora_E(\..+)?": "PEFT's AdaLoRA",
    r"hra_u": "PEFT's HRA",
    r"vblora_.+": "PEFT's VB-LoRA",
    r"(scale_weight|weight_scale|scaled_fp8|comfy_quant)": "a quantized model",
}
"""Suffixes of kinds that are known and not supported, to the name of the kind."""


@dataclass(frozen=True)
class Group:
    """The tensors of one module in a file.

    Attributes:
        module: Module name in the file.
        keys: Suffix to tensor key.
        factor_keys: The factor keys that read them.
    """

    module: str
    keys: Mapping[str, str]
    factor_keys: FactorKeys

    @property
    def sources(self) -> dict[str, str]:
        """Factor, or `alpha`, to the key of its tensor."""
        return {name if name == ALPHA else self.factor_keys.factor(name): key for name, key in self.keys.items()}

    def read(self, tensors: Mapping[str, Tensor], default_alpha: float | None = None) -> Delta:
        """Returns the validated delta; `default_alpha` applies if the module has no alpha tensor.

        Raises:
            AdapterError: The factors do not fit together; names the tensor.
        """
        parts = {suffix: tensors[key] for suffix, key in self.keys.items() if suffix != ALPHA}
        alpha = default_alpha
        if ALPHA in self.keys:
            stored = tensors[self.keys[ALPHA]]
            if stored.numel() != 1:
                problem, where = f"alpha has the shape {list(stored.shape)}", f"tensor {self.keys[ALPHA]!r}"
                raise AdapterError(problem, where=where, allowed="one number", remedy="check the file")
            alpha = float(stored.item())
        delta = self.factor_keys.read(parts, alpha)
        check_delta(delta, lambda: self.sources)
        return delta


def group_tensors(keys: Collection[str], layout: KeyLayout) -> Iterator[Group]:
    """Yields the modules of a file, sorted by name.

    Raises:
        AdapterError: A tensor is no factor of a known kind, or a module lacks a factor; names the tensor.
    """
    modules: dict[str, dict[str, str]] = {}
    split = list(layout.split(sorted(keys)))
    unknown = [key for key, _, suffix in split if suffix is None]
    for key, module, suffix in split:
        if suffix is None:
            # A tensor of a known kind says more than the first one.
            raise _unknown_key(next(filter(_unsupported_kind, unknown), key), layout)
        by_suffix = modules.setdefault(module, {})
        if suffix in by_suffix:
            raise _duplicate(key)
        by_suffix[suffix] = key
    # Cached per set of suffixes, because files have thousands of modules with few such sets.
    cache: dict[frozenset[str], FactorKeys] = {}
    for module, by_suffix in sorted(modules.items()):
        suffixes = frozenset(by_suffix)
        if suffixes not in cache:
            cache[suffixes] = _factor_keys_of(by_suffix, layout)
        yield Group(module, by_suffix, cache[suffixes])


def _factor_keys_of(by_suffix: Mapping[str, str], layout: KeyLayout) -> FactorKeys:
    suffixes = [suffix for suffix in by_suffix if suffix != ALPHA]
    first = by_suffix[suffixes[0] if suffixes else ALPHA]
    candidates = [keys for keys in layout.readable if set(suffixes) <= set(keys.suffixes)]
    if not candidates:
        others = ", ".join(repr(by_suffix[suffix]) for suffix in suffixes[1:])
        raise _unknown_key(first, layout, f" together with {others}")
    by_missing = {keys.missing(suffixes): keys for keys in candidates}
    if None in by_missing:
        keys = by_missing[None]
        if len({keys.factor(suffix) for suffix in suffixes}) == len(suffixes):
            return keys
        raise _duplicate(first)
    raise AdapterError(
        f"the module has no {next(iter(by_missing))!r} beside it",
        where=f"tensor {first!r}",
        allowed="every factor of a module in the same file",
        remedy="save or download the adapter again",
    )


def _duplicate(key: str) -> AdapterError:
    return AdapterError(
        "the module has one factor twice, under two keys",
        where=f"tensor {key!r}",
        allowed="one tensor for each factor",
        remedy="remove one of the two tensors",
    )


def _unsupported_kind(key: str) -> str:
    return next((title for pattern, title in _UNSUPPORTED.items() if re.search(rf"\.({pattern})$", key)), "")


def _unknown_key(key: str, layout: KeyLayout, beside: str = "") -> AdapterError:
    kind = _unsupported_kind(key)
    kinds = ", ".join(dict.fromkeys(keys.kind for keys in layout.readable))
    ending = ".".join(key.split(".")[-2 if key.endswith((".weight", ".bias")) else -1 :])
    near = [] if kind else difflib.get_close_matches(ending, sorted(layout.suffixes), n=3)
    return AdapterError(
        f"the tensor is of {kind}, which is not supported"
        if kind
        else f"this is no factor of a kind that the {layout.name} layout has keys for{beside}",
        where=f"tensor {key!r}",
        allowed=f"names that end in {' or '.join(near)}; the kinds {kinds}" if near else f"the kinds {kinds}",
        remedy="merge it into its base with the program that made it, and extract the difference (loraline extract)"
        if kind
        else "convert the adapter with the program that made it",
    )
