"""Weights per block of a denoiser, in the lists of A1111's block-weight extension, and per layer by name.

`lbw=1,0,0,...`: the first value is that of the text encoders. A block that a short list leaves out has weight 0; a
module in no block has weight 1. `layers=unet.mid_block=0.5,*.attn2.*=0`: the first name that fits counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from lora_engine.errors import SettingsError

_UNETS = ("sd", "sdxl")
_WEIGHT = re.compile(r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})")
_MAX_LAYERS, _MAX_PATTERN = 100, 200
_UNET = ("BASE", *(f"IN{n:02d}" for n in range(12)), "MID", *(f"OUT{n:02d}" for n in range(12)))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LISTS: Mapping[int, tuple[str, ...]] = {
    12: _listed("BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"),
    17: _listed(
        "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    ),
    20: ("BASE", *(f"IN{n:02d}" for n in range(9)), "MID", *(f"OUT{n:02d}" for n in range(9))),
    26: _UNET,
    61: ("CLIP", "T5", "IN", *(f"D{n:02d}" for n in range(19)), *(f"S{n:02d}" for n in range(38)), "OUT"),
}
"""Names of the values by their number: LoRA on SDXL, LoRA on SD, LyCORIS on SDXL, LyCORIS on SD, FLUX.1."""

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
    if len(parts) not in LISTS:
        raise SettingsError(
            f"block weights {text[:80]!r}: {'no such preset' if len(parts) == 1 else f'{len(parts)} values'}",
            allowed=f"{', '.join(BLOCK_PRESETS)}, or {', '.join(map(str, LISTS))} numbers",
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
    """Returns True if the list has the blocks of this family; those of FLUX.1 mean nothing in a U-Net."""
    return family in _UNETS if "BASE" in weights else family == "flux"


def weight_of_module(module: str, weights: Mapping[str, float], family: str) -> float:
    """Returns the weight of a module (diffusers' name with its component, such as `unet.mid_block...`)."""
    block = block_of(module, family)
    if block is None:
        return 1.0
    return weights.get(block, 0.0)


def block_of(module: str, family: str) -> str | None:
    """Returns the block of a module, such as `IN04`; None for a module in no block."""
    component, _, name = module.partition(".")
    if component.startswith("text_encoder"):
        if family != "flux":
            return "BASE"
        return "CLIP" if component == "text_encoder" else "T5"
    return _flux_block(name) if family == "flux" else _unet_block(name, family)


def _flux_block(name: str) -> str:
    if match := re.match(r"(single_)?transformer_blocks\.([0-9]+)\.", name):
        return f"{'S' if match[1] else 'D'}{int(match[2]):02d}"
    return "OUT" if name.startswith(("norm_out", "proj_out")) else "IN"


def _unet_block(name: str, family: str) -> str | None:
    if name.startswith("conv_in"):
        return "IN00"
    if name.startswith("mid_block."):
        return "MID"
    if match := re.match(r"(down|up)_blocks\.([0-9]+)\.(resnets|attentions|downsamplers|upsamplers)\.([0-9]+)", name):
        level, index = int(match[2]), int(match[4])
        if match[1] == "down":
            return f"IN{3 * level + (3 if match[3] == 'downsamplers' else 1 + index):02d}"
        return f"OUT{3 * level + (2 if match[3] == 'upsamplers' else index):02d}"
    return None


def _by_block(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(LISTS[len(values)], values, strict=True))
