"""Rewrites captions for a batch: pure functions of the caption, the settings and a generator."""

from __future__ import annotations

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
        tags = len(self._tags(caption)) - settings.keep_tokens
        return (
            len(self._templates) > 1
            or (settings.shuffle and tags > 1)
            or (settings.tag_dropout > 0 and tags > 0)
            or (settings.wildcards and "{" in caption)
            or any(len(choices) > 1 and piece in caption for piece, choices in settings.replacements.items())
        )

    def rewrite(self, caption: str, draw: torch.Generator | None = None) -> str:
        """Returns the rewritten caption.

        Args:
            caption: Caption of the manifest.
            draw: CPU generator; None draws nothing and takes the first of all choices and all tags in order, which
                keeps validations comparable.
        """
        settings = self._settings
        text = expand_wildcards(caption, draw) if settings.wildcards else caption
        for piece, choices in settings.replacements.items():
            if piece in text:
                text = text.replace(piece, choices[_pick(len(choices), draw)])
        if draw is not None and (settings.shuffle or settings.tag_dropout):
            text = self._change_tags(text, draw)
        template = self._templates[_pick(len(self._templates), draw)]
        return f"{settings.prefix}{template.replace('{}', text)}{settings.suffix}"

    def _tags(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self._settings.separator) if tag.strip()]

    def _change_tags(self, text: str, draw: torch.Generator) -> str:
        settings, tags = self._settings, self._tags(text)
        fixed, movable = tags[: settings.keep_tokens], tags[settings.keep_tokens :]
        # Both are always drawn, so that one setting does not change the draws of the other.
        is_kept = (torch.rand(len(movable), generator=draw) >= settings.tag_dropout).tolist()
        order = torch.randperm(len(movable), generator=draw).tolist()
        indices = order if settings.shuffle else range(len(movable))
        join = settings.separator if settings.separator.isspace() else f"{settings.separator.strip()} "
        return join.join([*fixed, *(movable[index] for index in indices if is_kept[index])])


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
