"""Weights per block of a denoiser, in the lists of A1111's block-weight extension, and per layer by name.

`lbw=1,0,0,...`: the first value is that of the text encoders. A block that a short list leaves out has weight 0; a
module in no block has weight 1. `layers=unet.mid_block=0.5,*.attn2.*=0`: the first name that fits counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache

from lora_engine.errors import SettingsError
from lora_engine.families import families

_WEIGHT = re.compile(r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})")
_MAX_LAYERS, _MAX_PATTERN = 100, 200

BLOCK_PRESETS: Mapping[str, tuple[float, ...]] = {
    name: tuple(map(float, values.split(",")))
    for name, values in {
        "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
        "INS": "1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "IND": "1,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0,0",
        "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
        "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
        "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
        "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    }.items()
}
"""Lists of 17 values that the extension comes with."""


def parse_block_weights(text: str) -> dict[str, float]:
    """Reads the name of a preset, or 12, 17, 20, 26 or 61 numbers; returns the weights by block, 0 for others.

    Raises:
        SettingsError: Another number of values, one that is not a number, or no such preset. `R`, `U` and `X` (random,
            or a value of the extension's page) are no numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and parts[0] in BLOCK_PRESETS:
        return _by_block(BLOCK_PRESETS[parts[0]])
    if len(parts) not in block_lists():
        raise SettingsError(
            f"block weights {text[:80]!r}: {'no such preset' if len(parts) == 1 else f'{len(parts)} values'}",
            allowed=f"{', '.join(BLOCK_PRESETS)}, or {', '.join(map(str, block_lists()))} numbers",
        )
    for index, part in enumerate(parts):
        if not _WEIGHT.fullmatch(part):
            raise SettingsError(
                f"block weight {part[:80]!r} (value {index + 1})",
                allowed="numbers",
                remedy="write the number that `R`, `U` or `X` means" if part[:1] in {"R", "U", "X"} else "",
            )
    return _by_block([float(part) for part in parts])


def parse_layer_weights(text: str) -> tuple[tuple[str, float], ...]:
    """Reads `NAME=WEIGHT,NAME=WEIGHT`; returns the pairs.

    A name is that of a module in diffusers, such as `unet.mid_block`, which means all modules within it; or a glob
    over whole names, such as `*.attn2.*`.

    Raises:
        SettingsError: A pair cannot be read, or there are more than 100.
    """
    pairs = []
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        if not name.strip() or len(name) > _MAX_PATTERN or not _WEIGHT.fullmatch(weight.strip()):
            raise SettingsError(f"layer weight {part[:80]!r}", allowed="NAME=WEIGHT, such as unet.mid_block=0.5")
        pairs.append((name.strip(), float(weight)))
    if len(pairs) > _MAX_LAYERS:
        raise SettingsError(f"{len(pairs)} layer weights", allowed=f"at most {_MAX_LAYERS}")
    return tuple(pairs)


def fits_layer(name: str, module: str) -> bool:
    """Returns True if a name or glob of `parse_layer_weights` fits a module."""
    is_glob = any(character in name for character in "*?[")
    return fnmatchcase(module, name) if is_glob else f"{module}.".startswith(f"{name.removesuffix('.')}.")


def weight_of_layer(module: str, weights: Sequence[tuple[str, float]]) -> float:
    """Returns the weight of the first name that fits a module; 1 if none does."""
    return next((weight for name, weight in weights if fits_layer(name, module)), 1.0)


def fits_family(weights: Mapping[str, float], family: str) -> bool:
    """Returns True if the family has a list with these blocks; those of FLUX.1 mean nothing in a U-Net."""
    blocks = families[family].blocks if family in families else None
    return blocks is not None and weights.keys() <= {name for names in blocks.lists for name in names}


def weight_of_module(module: str, weights: Mapping[str, float], family: str) -> float:
    """Returns the weight of a module (diffusers' name with its component, such as `unet.mid_block...`)."""
    block = block_of(module, family)
    if block is None:
        return 1.0
    return weights.get(block, 0.0)


def block_of(module: str, family: str) -> str | None:
    """Returns the block of a module, such as `IN04`; None for a module in no block."""
    blocks = families[family].blocks if family in families else None
    return None if blocks is None else blocks.block_of(module)


@cache
def block_lists() -> Mapping[int, tuple[str, ...]]:
    """Returns the lists of all families by their number of values, ascending."""
    lists = {len(names): names for family in families.values() if family.blocks for names in family.blocks.lists}
    return dict(sorted(lists.items()))


def describe_lists() -> str:
    """Returns the numbers of values with the families that they are for."""
    by_lists: dict[tuple[int, ...], list[str]] = {}
    for family in families.values():
        if family.blocks is not None:
            by_lists.setdefault(tuple(sorted(map(len, family.blocks.lists))), []).append(family.name)
    return "; ".join(
        f"{', '.join(map(str, counts))} values for {', '.join(names)}" for counts, names in by_lists.items()
    )


def _by_block(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(block_lists()[len(values)], values, strict=True))
