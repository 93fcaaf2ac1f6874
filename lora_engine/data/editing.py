"""Applies the edits of captions, each a pure function of all captions. Must not import torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

from lora_engine.data.edits import (
    BlacklistEdit,
    DeduplicateEdit,
    ImpliedEdit,
    OrderEdit,
    PrefixEdit,
    ReplaceEdit,
    SuffixEdit,
    TriggerEdit,
    UnderscoresEdit,
)
from lora_engine.data.spec import CaptionSettings
from lora_engine.data.text_files import clean_text
from lora_engine.data.trigger import add_trigger, whole_word

# Faces of characters, whose underscores are no spaces.
_KAOMOJI = frozenset(
    "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split()  # noqa: SIM905
)


def edit_captions(texts: Sequence[str], edits: Sequence[Any], settings: CaptionSettings) -> list[str]:
    """Returns the captions after all edits, in their order.

    Args:
        texts: The captions; an empty one stays empty until the trigger is added.
        edits: Instances of `Edit`.
        settings: Has trigger, class word and template.
    """
    captions = [clean_text(text) for text in texts]
    for edit in edits:
        captions = [clean_text(text) for text in _EDITS[type(edit)](captions, edit, settings)]
    return captions


def to_spaces(tag: str) -> str:
    """Returns a tag with spaces instead of underscores, except those of a face such as `^_^`."""
    return tag if tag in _KAOMOJI else tag.replace("_", " ")


def split_tags(text: str) -> list[str]:
    """Returns the parts of a caption between commas that are not empty."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _prefix(texts: list[str], edit: PrefixEdit, _: CaptionSettings) -> list[str]:
    return [", ".join(filter(None, (edit.text, text))) for text in texts]


def _suffix(texts: list[str], edit: SuffixEdit, _: CaptionSettings) -> list[str]:
    return [", ".join(filter(None, (text, edit.text))) for text in texts]


def _trigger(texts: list[str], _: TriggerEdit, settings: CaptionSettings) -> list[str]:
    return [add_trigger(text, settings) for text in texts]


def _replace(texts: list[str], edit: ReplaceEdit, _: CaptionSettings) -> list[str]:
    pattern = whole_word(edit.text) if edit.whole_words else re.escape(edit.text)
    expression = re.compile(pattern, re.IGNORECASE if edit.ignore_case else 0)
    return [expression.sub(lambda _: edit.by, text) for text in texts]


def _blacklist(texts: list[str], edit: BlacklistEdit, _: CaptionSettings) -> list[str]:
    return [_join(tag for tag in split_tags(text) if not _matches(tag, edit.tags)) for text in texts]


def _underscores(texts: list[str], _: UnderscoresEdit, __: CaptionSettings) -> list[str]:
    return [re.sub(r"[^\s,]+", lambda match: to_spaces(match[0]), text) for text in texts]


def _order(texts: list[str], edit: OrderEdit, _: CaptionSettings) -> list[str]:
    def position(tag: str) -> tuple[int, str]:
        ranks = (rank for rank, glob in enumerate(edit.first) if _matches(tag, (glob,)))
        rank = next(ranks, len(edit.first))
        return rank, tag.lower() if edit.rest == "alphabet" and rank == len(edit.first) else ""

    return [_join(sorted(split_tags(text), key=position)) for text in texts]


def _deduplicate(texts: list[str], _: DeduplicateEdit, __: CaptionSettings) -> list[str]:
    return [
        _join({tag.lower(): tag for tag in reversed(split_tags(text))}[tag] for tag in _distinct(text))
        for text in texts
    ]


def _distinct(text: str) -> list[str]:
    return list(dict.fromkeys(tag.lower() for tag in split_tags(text)))


def _implied(texts: list[str], edit: ImpliedEdit, settings: CaptionSettings) -> list[str]:
    globs = [*edit.tags, *([_literal(settings.class_word)] if settings.class_word else [])]
    common: set[str] = set()
    if edit.share and len(texts) > 1:
        counts = Counter(tag for text in texts for tag in _distinct(text))
        trigger = (settings.trigger or "").lower()
        common = {tag for tag, count in counts.items() if count >= edit.share * len(texts) and tag != trigger}
    return [
        _join(tag for tag in split_tags(text) if tag.lower() not in common and not _matches(tag, globs))
        for text in texts
    ]


def _matches(tag: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(tag.lower(), glob.lower()) for glob in globs)


def _literal(word: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", word)


def _join(tags: Any) -> str:
    return ", ".join(tags)


_EDITS: dict[type[BaseModel], Callable[[list[str], Any, CaptionSettings], list[str]]] = {
    PrefixEdit: _prefix,
    SuffixEdit: _suffix,
    TriggerEdit: _trigger,
    ReplaceEdit: _replace,
    BlacklistEdit: _blacklist,
    UnderscoresEdit: _underscores,
    OrderEdit: _order,
    DeduplicateEdit: _deduplicate,
    ImpliedEdit: _implied,
}
