"""Selects the modules of an adapter: presets and patterns over canonical module names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from lora_engine.adapters.tree import near_names
from lora_engine.errors import SettingsError

_ATTENTION = re.compile(r".*\.attn\d*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)")
# FLUX's single blocks have one output layer for attention and feed-forward, `proj_out`.
_FEED_FORWARD = re.compile(r".*\.(ff(_context)?\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.proj_(mlp|out))")
_CLIP = r"self_attn\.(q|k|v|out)_proj|mlp\.fc[12]"
_T5 = r"SelfAttention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo)"
_TEXT = re.compile(rf".*\.({_CLIP}|{_T5})")
_IN_BLOCK = re.compile(r"[^.]+\.(.*\.)?(\w*blocks|mid_block)\..*")
_NO_DENOISER = ("text_encoder", "vae")

Shape = Sequence[int]
PRESETS: Mapping[str, Callable[[str, Shape], bool]] = {
    "attention": lambda name, shape: _in_block(name) and bool(_ATTENTION.fullmatch(name)),
    "attention+ff": lambda name, shape: (
        _in_block(name) and bool(_ATTENTION.fullmatch(name) or _FEED_FORWARD.fullmatch(name))
    ),
    "linear": lambda name, shape: _in_block(name) and len(shape) == 2,
    "all": lambda name, shape: _in_block(name) and len(shape) > 1,
    "norms": lambda name, shape: _in_block(name) and len(shape) == 1,
    "text": lambda name, shape: name.startswith("text_encoder") and bool(_TEXT.fullmatch(name)),
}
"""Preset name to its test of (module name, weight shape). All but `text` select within the denoiser's blocks: the
narrow first and last layers (`conv_in`, `conv_out`) allow hardly any rank, and need a pattern."""


def select_modules(modules: Mapping[str, Shape], targets: str | Sequence[str]) -> list[str]:
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


_ALLOWED = f"the presets {', '.join(PRESETS)}, a glob such as 'unet.*.to_q', or 're:' and a regular expression"


def _test(target: str) -> Callable[[str, Shape], bool]:
    if target in PRESETS:
        return PRESETS[target]
    if not target.startswith("re:"):
        return lambda name, _: fnmatchcase(name, target)
    try:
        expression = re.compile(target[3:])
    except re.error as error:
        raise SettingsError(
            f"target {target!r} is not a regular expression: {error}",
            allowed=_ALLOWED,
            remedy="fix the expression",
        ) from error
    return lambda name, _: bool(expression.fullmatch(name))


def _in_block(name: str) -> bool:
    return not name.startswith(_NO_DENOISER) and bool(_IN_BLOCK.fullmatch(name))
