"""What a caption becomes in a batch: a pure function of the caption, the settings and a generator. No encoding here."""

from __future__ import annotations

import torch

from lora_engine.training.specs.captions import Captions

# Own lists after the idea of Gal et al. 2022 (textual inversion): plain frames around the concept, so that what is
# learnt is the concept and not the frame.
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
    """Rewrites captions as the settings say.

    Args:
        settings: See `Captions`.
    """

    def __init__(self, settings: Captions) -> None:
        self._settings = settings
        named = settings.templates
        self._templates: tuple[str, ...] = _LISTS[named] if isinstance(named, str) else named or ("{}",)

    def varies(self, caption: str) -> bool:
        """Whether a caption may become different texts."""
        chosen = self._settings
        tags = len(self._tags(caption)) - chosen.keep_tokens
        return (
            len(self._templates) > 1
            or (chosen.shuffle and tags > 1)
            or (chosen.tag_dropout > 0 and tags > 0)
            or (chosen.wildcards and "{" in caption)
            or any(len(others) > 1 and piece in caption for piece, others in chosen.replacements.items())
        )

    def rewrite(self, caption: str, draw: torch.Generator | None = None) -> str:
        """What the caption becomes.

        Args:
            caption: As the manifest has it.
            draw: On the CPU; None draws nothing: the first of all choices, all tags in their order. Validation, which
                must compare, takes this.
        """
        chosen = self._settings
        text = expand_wildcards(caption, draw) if chosen.wildcards else caption
        for piece, others in chosen.replacements.items():
            if piece in text:
                text = text.replace(piece, others[_pick(len(others), draw)])
        if draw is not None and (chosen.shuffle or chosen.tag_dropout):
            text = self._change_tags(text, draw)
        template = self._templates[_pick(len(self._templates), draw)]
        return f"{chosen.prefix}{template.replace('{}', text)}{chosen.suffix}"

    def _tags(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self._settings.separator) if tag.strip()]

    def _change_tags(self, text: str, draw: torch.Generator) -> str:
        chosen, tags = self._settings, self._tags(text)
        kept, others = tags[: chosen.keep_tokens], tags[chosen.keep_tokens :]
        # Both numbers are drawn always, so that one setting does not shift what the other one draws.
        stays = (torch.rand(len(others), generator=draw) >= chosen.tag_dropout).tolist()
        order = torch.randperm(len(others), generator=draw).tolist()
        places = order if chosen.shuffle else range(len(others))
        join = chosen.separator if chosen.separator.isspace() else f"{chosen.separator.strip()} "
        return join.join([*kept, *(others[place] for place in places if stays[place])])


def expand_wildcards(text: str, draw: torch.Generator | None = None) -> str:
    """The text with each `{a|b}` replaced by one of its parts, inner ones first; None takes the first parts.

    Braces without a partner, and without `|` between them, are text.
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
    # What was never closed is put back as it was written.
    while len(parts) > 1:
        options = parts.pop()
        parts[-1][-1] += "{" + "|".join(options)
    return parts[0][0]


def _pick(count: int, draw: torch.Generator | None) -> int:
    return int(torch.randint(count, (), generator=draw)) if draw is not None and count > 1 else 0
