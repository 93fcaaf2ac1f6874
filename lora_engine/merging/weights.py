"""Resolves the weights of a merge: a number for all modules, or numbers by pattern over canonical module names.

Must not import torch. A pattern is one of:

- the path of a module or of a parent: `unet`, `text_encoder`, `unet.down_blocks.1`, `unet.mid_block`;
- a preset: `unet.down`, `unet.mid`, `unet.up`, or a path below one, such as `unet.up.2`;
- a glob over whole names: `unet.*.to_q`, `*`;
- a slot of the block-weight lists of kohya's scripts and the web UIs: `BASE`, `IN04`, `M00`, `OUT11`.

If several patterns match a module, the one with the most literal characters wins, counted after presets and slots are
expanded. A module without a match has weight 1; set `"*"` to change that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from lora_engine.adapters.select import check_length
from lora_engine.errors import SettingsError
from lora_engine.families.block_names import UNET_BLOCKS
from lora_engine.merging.spec import Weight

_PRESET = re.compile(r"unet\.(down|mid|up)(?=\.|$)")
_LEVELS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
_PRESETS = frozenset(f"unet.{side}" for side in _LEVELS)
_SLOT = re.compile(r"BASE|M00|(IN|OUT)(\d\d)")

BLOCK_LISTS: Mapping[int, tuple[str, ...]] = {
    len(names): tuple("M00" if name == "MID" else name for name in names) for names in UNET_BLOCKS.lists
}
"""Length of a block-weight list to its slots: 17 (attention) and 26 (all) for Stable Diffusion, 12 and 20 for SDXL."""


def block_weights(numbers: Sequence[float]) -> dict[str, float]:
    """Returns the weights of a block-weight list by slot.

    Raises:
        SettingsError: The list has another length.
    """
    if len(numbers) not in BLOCK_LISTS:
        raise SettingsError(
            f"{len(numbers)} block weights",
            allowed="12 or 20 for SDXL, 17 or 26 for Stable Diffusion",
            remedy="set one number per slot",
        )
    return dict(zip(BLOCK_LISTS[len(numbers)], map(float, numbers), strict=True))


def weights_by_module(weight: Weight, own: Collection[str], names: Collection[str] | None = None) -> dict[str, float]:
    """Returns the weight of each module.

    Args:
        weight: A number, or numbers by pattern.
        own: Canonical names of the adapter's modules.
        names: Modules of the result; None means those of the adapter.

    Raises:
        SettingsError: A weight is not finite, a pattern matches no module (slots and presets may), or two equally
            specific patterns give a module different weights.
    """
    names = own if names is None else names
    if not isinstance(weight, Mapping):
        return dict.fromkeys(names, _finite(weight))
    rules = [(key, glob, _finite(number)) for key, number in weight.items() for glob in _globs(key)]
    _check_all_match(weight, rules, own)
    return {name: _most_specific(name, rules) for name in names}


def _most_specific(name: str, rules: Sequence[tuple[str, str, float]]) -> float:
    matches = [(_literals(glob), key, number) for key, glob, number in rules if _matches(glob, name)]
    if not matches:
        return 1.0
    top = max(literals for literals, _, _ in matches)
    best = {number: key for literals, key, number in matches if literals == top}
    if len(best) > 1:
        raise SettingsError(
            f"the patterns {', '.join(map(repr, best.values()))} give {', '.join(f'{number:g}' for number in best)}",
            where=name,
            allowed="one weight per module",
            remedy="make one pattern more specific, or remove it",
        )
    return next(iter(best))


def _check_all_match(
    weight: Mapping[str, float], rules: Sequence[tuple[str, str, float]], names: Collection[str]
) -> None:
    used = {key for key, glob, _ in rules if any(_matches(glob, name) for name in names)}
    for key in weight:
        if key in used or key == "*" or _SLOT.fullmatch(key) or key in _PRESETS:
            continue
        components = sorted({name.partition(".")[0] for name in names})
        raise SettingsError(
            f"the weight pattern {key!r} matches none of the adapter's {len(names)} modules",
            allowed=f"{', '.join(components)}, a path or glob below them, unet.down, unet.mid, unet.up, BASE, IN00 ...",
            remedy="fix the pattern, or remove it",
        )


def _globs(key: str) -> Iterator[str]:
    """Yields the globs of a preset or a slot, or the pattern itself."""
    slot = _SLOT.fullmatch(key)
    if slot is not None:
        yield from _blocks_of_slot(key, *slot.groups())
    else:
        yield _PRESET.sub(lambda match: f"unet.{_LEVELS[match.group(1)]}", key)


def _blocks_of_slot(slot: str, side: str | None, digits: str | None) -> Iterator[str]:
    # The numbering of Stable Diffusion's original code: three inputs per level (two blocks and a downsampler, after
    # conv_in), and three outputs per level (the upsampler belongs to the third).
    if side is None or digits is None:
        yield from ("text_encoder", "text_encoder_2") if slot == "BASE" else ("unet.mid_block",)
        return
    number = int(digits)
    if side == "OUT":
        level, index = divmod(number, 3)
        yield from (f"unet.up_blocks.{level}.{part}.{index}" for part in ("resnets", "attentions"))
        if index == 2:
            yield f"unet.up_blocks.{level}.upsamplers"
    elif number == 0:
        yield "unet.conv_in"
    else:
        level, index = divmod(number - 1, 3)
        if index == 2:
            yield f"unet.down_blocks.{level}.downsamplers"
        else:
            yield from (f"unet.down_blocks.{level}.{part}.{index}" for part in ("resnets", "attentions"))


def _matches(glob: str, name: str) -> bool:
    if any(sign in glob for sign in "*?["):
        check_length(glob)
        return fnmatchcase(name, glob)
    return name == glob or name.startswith(f"{glob}.")


def _literals(glob: str) -> int:
    return sum(character not in "*?[]" for character in glob)


def _finite(number: float) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise SettingsError(f"the weight {number!r}", allowed="a finite number", remedy="choose another weight")
    return float(number)
