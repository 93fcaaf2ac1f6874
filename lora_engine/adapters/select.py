"""Selects the modules of an adapter: presets and patterns over canonical module names."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from lora_engine.adapters.module_names import near_names
from lora_engine.errors import SettingsError
from lora_engine.families import families

_MAX_REPEATS = 4
MAX_PATTERN = 1_000
"""Characters of a pattern; translating a glob takes quadratic time, and no name of a module is as long."""
# A part of a regular expression: an escape, a class, a repetition that is no mere option, a bracket or a character.
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<repeat>[*+][?+]?|\{\d*,?\d*\}[?+]?)|.", re.DOTALL)
_NO_DENOISER = ("text_encoder", "vae")

_Shape = Sequence[int]
TARGET_PRESETS: Mapping[str, Callable[[str, _Shape], bool]] = {
    "attention": lambda name, shape: _in_block(name) and _matches("attention", name),
    "attention+ff": lambda name, shape: (
        _in_block(name) and (_matches("attention", name) or _matches("feed_forward", name))
    ),
    "linear": lambda name, shape: _in_block(name) and len(shape) == 2,
    "all": lambda name, shape: _in_block(name) and len(shape) > 1,
    "norms": lambda name, shape: _in_block(name) and len(shape) == 1,
    "text": lambda name, shape: _matches("text", name),
}
"""Preset name to its test of (module name, weight shape), from the patterns of all families.

All but `text` select within the denoiser's blocks: the narrow first and last layers (`conv_in`, `conv_out`) allow
hardly any rank, and need a pattern."""


def select_modules(modules: Mapping[str, _Shape], targets: str | Sequence[str]) -> list[str]:
    """Returns the names of the modules that the targets match, in the order of `modules`.

    Args:
        modules: Canonical name to weight shape, as from `module_shapes`.
        targets: One or several of: a preset (`attention`, `attention+ff`, `linear`, `all`, `norms`, `text`), a glob
            over whole names (`unet.*.to_q`), or `re:` and a regular expression for whole names.

    Raises:
        SettingsError: A target matches no module, or a regular expression is invalid.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise SettingsError("the list of targets is empty", allowed=_ALLOWED, remedy="name at least one target")
    chosen: set[str] = set()
    for target in patterns:
        test = _test(target)
        matches = {name for name, shape in modules.items() if test(name, shape)}
        if not matches:
            raise SettingsError(
                f"target {target!r} matches no module in the base",
                allowed=f"{_ALLOWED}; the base has {near_names(target.removeprefix('re:'), modules)}",
                remedy="choose a preset, or fix the pattern",
            )
        chosen |= matches
    return [name for name in modules if name in chosen]


_ALLOWED = f"the presets {', '.join(TARGET_PRESETS)}, a glob such as 'unet.*.to_q', or 're:' and a regular expression"


def _test(target: str) -> Callable[[str, _Shape], bool]:
    if target in TARGET_PRESETS:
        return TARGET_PRESETS[target]
    check_length(target)
    if not target.startswith("re:"):
        return lambda name, _: fnmatchcase(name, target)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # such as of a nested set, whose meaning will change
            expression = re.compile(target[3:])
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise SettingsError(
            f"target {target!r} is not a regular expression: {error}",
            allowed=_ALLOWED,
            remedy="fix the expression",
        ) from error
    _check_repeats(target)
    return lambda name, _: bool(expression.fullmatch(name))


def check_length(pattern: str) -> None:
    """Raises an error for a pattern of more than `MAX_PATTERN` characters.

    Raises:
        SettingsError: It is too long.
    """
    if len(pattern) > MAX_PATTERN:
        raise SettingsError(
            f"the pattern {pattern[:40]!r}... has {len(pattern):,} characters",
            allowed=f"at most {MAX_PATTERN:,}",
            remedy="list several patterns",
        )


def _check_repeats(target: str) -> None:
    """Raises an error for an expression that can take exponential time, such as `(a+)+`, or high powers of a length.

    Raises:
        SettingsError: A group with a repetition or alternatives is repeated, or there are too many repetitions.
    """
    groups, count, last, repeats = [False], 0, False, False
    for match in _ATOM.finditer(target[3:]):
        part = match[0]
        if match["repeat"] is not None:
            repeats |= last
            groups[-1], count, last = True, count + 1, True
            continue
        last = False
        if part == "(":
            groups.append(False)
        elif part == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] |= last
        elif part == "|":
            groups[-1] = True
    if repeats or count > _MAX_REPEATS:
        raise SettingsError(
            f"target {target!r} can take very long to match",
            allowed=f"at most {_MAX_REPEATS} repetitions (*, +), none of a group with repetitions or alternatives",
            remedy="list several simpler targets, or use globs",
        )


def _in_block(name: str) -> bool:
    return not name.startswith(_NO_DENOISER) and _matches("blocks", name)


def _matches(pattern: str, name: str) -> bool:
    return bool(_joint(pattern, tuple(families)).fullmatch(name))


@functools.cache
def _joint(pattern: str, names: tuple[str, ...]) -> re.Pattern[str]:
    """Returns one of the patterns in `Targets`, joined over the families; their names do not clash."""
    patterns = dict.fromkeys(getattr(families[name].targets, pattern) for name in names)
    return re.compile("|".join(f"(?:{entry})" for entry in patterns))
