"""Rewrites captions for a batch: pure functions of the caption, the settings and a generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_engine.training.specs.captions import Captions

# Our lists after Gal et al. 2022 (textual inversion): neutral templates, so that the concept is learned and not the
# template.
OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "a close-up photo of a {}",
    "a bright photo of a {}",
    "a dark photo of a {}",
    "a cropped photo of a {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a rendering of a {}",
    "an image of the {}",
    "a snapshot of a {}",
    "a detailed photo of a {}",
)
STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a picture in the style of {}",
    "a drawing in the style of {}",
    "a rendering in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a dark painting in the style of {}",
    "a cropped painting in the style of {}",
    "a detailed picture in the style of {}",
    "a small work in the style of {}",
    "a large work in the style of {}",
    "an illustration in the style of {}",
)
_LISTS = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}


class Rewriter:
    """Rewrites captions by the settings.

    Args:
        settings: See `Captions`.
    """

    def __init__(self, settings: Captions) -> None:
        self._settings = settings
        templates = settings.templates
        self._templates: tuple[str, ...] = _LISTS[templates] if isinstance(templates, str) else templates or ("{}",)

    def varies(self, caption: str) -> bool:
        """Returns True if a caption may become different texts."""
        settings = self._settings
        tags = len(self._parts(caption)[1])
        return (
            len(self._templates) > 1
            or (settings.shuffle and tags > 1)
            or ((settings.tag_dropout > 0 or settings.tag_warmup > 0) and tags > 0)
            or (settings.wildcards and "{" in caption)
            or any(len(choices) > 1 and piece in caption for piece, choices in settings.replacements.items())
        )

    def rewrite(self, caption: str, draw: torch.Generator | None = None, step: int | None = None) -> str:
        """Returns the rewritten caption.

        Args:
            caption: Caption of the manifest.
            draw: CPU generator; None draws nothing and takes the first of all choices and all tags in order, which
                keeps validations comparable.
            step: Step of the phase, from 0, for the tag warmup; None is after it.
        """
        settings = self._settings
        text = expand_wildcards(caption, draw) if settings.wildcards else caption
        for piece, choices in settings.replacements.items():
            if piece in text:
                text = text.replace(piece, choices[_pick(len(choices), draw)])
        is_warming = step is not None and step < settings.tag_warmup
        if draw is not None and (settings.shuffle or settings.tag_dropout or is_warming):
            text = self._change_tags(text, draw, step if is_warming else None)
        elif settings.keep_separator is not None and settings.keep_separator in text:
            text = self._join.join(tag for part in self._parts(text) for tag in part)
        if settings.secondary_separator is not None:
            text = text.replace(settings.secondary_separator, self._join)
        template = self._templates[_pick(len(self._templates), draw)]
        return f"{settings.prefix}{template.replace('{}', text)}{settings.suffix}"

    @property
    def _join(self) -> str:
        separator = self._settings.separator
        return separator if separator.isspace() else f"{separator.strip()} "

    def _tags(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self._settings.separator) if tag.strip()]

    def _parts(self, text: str) -> tuple[list[str], list[str], list[str]]:
        """Returns the tags of a text that stay in front, those that may move, and those that stay at the end."""
        separator, count = self._settings.keep_separator, self._settings.keep_tokens
        if separator is None or separator not in text:
            tags = self._tags(text)
            return tags[:count], tags[count:], []
        first, _, rest = text.partition(separator)
        movable, _, last = rest.partition(separator)
        return self._tags(first), self._tags(movable), self._tags(last)

    def _change_tags(self, text: str, draw: torch.Generator, step: int | None) -> str:
        settings = self._settings
        first, movable, last = self._parts(text)
        # Both are always drawn, so that one setting does not change the draws of the other.
        is_kept = (torch.rand(len(movable), generator=draw) >= settings.tag_dropout).tolist()
        order = torch.randperm(len(movable), generator=draw).tolist()
        indices = order if settings.shuffle else list(range(len(movable)))
        if step is not None:
            begin = min(settings.first_tags, len(movable))
            indices = indices[: begin + step * (len(movable) - begin) // settings.tag_warmup]
        return self._join.join([*first, *(movable[index] for index in indices if is_kept[index]), *last])


def draw_caption(captions: Sequence[str], draw: torch.Generator) -> str:
    """Returns one of the captions of an image, all equally likely; draws nothing if there is one only."""
    return captions[_pick(len(captions), draw)]


def expand_wildcards(text: str, draw: torch.Generator | None = None) -> str:
    """Returns the text with each `{a|b}` replaced by one of its parts, inner ones first.

    Unbalanced braces, and braces without `|`, are text.

    Args:
        text: Text with wildcards.
        draw: CPU generator; None takes the first parts.
    """
    parts: list[list[str]] = [[""]]
    for character in text:
        if character == "{":
            parts.append([""])
        elif character == "|" and len(parts) > 1:
            parts[-1].append("")
        elif character == "}" and len(parts) > 1:
            options = parts.pop()
            parts[-1][-1] += options[_pick(len(options), draw)] if len(options) > 1 else f"{{{options[0]}}}"
        else:
            parts[-1][-1] += character
    # Restores braces that were never closed.
    while len(parts) > 1:
        options = parts.pop()
        parts[-1][-1] += "{" + "|".join(options)
    return parts[0][0]


def _pick(count: int, draw: torch.Generator | None) -> int:
    return int(torch.randint(count, (), generator=draw)) if draw is not None and count > 1 else 0
