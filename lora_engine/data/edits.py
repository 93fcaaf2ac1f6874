"""The edits of captions: one ordered list, each a pure function of all captions. Must not import torch.

Edits of tags take a caption as tags separated by commas. Patterns are globs (`*background*`) of bounded length, which
ignore case; there are no regular expressions, so no pattern takes long.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_engine.data.text_files import clean_text

if TYPE_CHECKING:
    from lora_engine.data.spec import CaptionSettings

_Text = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
_OptionalText = Annotated[str, Field(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Glob = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f,]*$")]
_Globs = Annotated[tuple[_Glob, ...], Field(max_length=500)]
# Faces of characters, whose underscores are no spaces.
_KAOMOJI = frozenset(
    "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split()  # noqa: SIM905
)


class _EditSpec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrefixEdit(_EditSpec):
    """Puts a text before every caption, separated by a comma.

    Attributes:
        text: The text.
    """

    edit: Literal["prefix"] = "prefix"
    text: _Text


class SuffixEdit(_EditSpec):
    """Puts a text after every caption, separated by a comma.

    Attributes:
        text: The text.
    """

    edit: Literal["suffix"] = "suffix"
    text: _Text


class TriggerEdit(_EditSpec):
    """Puts the filled template (with the trigger) before every caption that lacks the trigger.

    Without this edit, that happens after all edits.
    """

    edit: Literal["trigger"] = "trigger"


class ReplaceEdit(_EditSpec):
    """Replaces a text.

    Attributes:
        text: The text to replace.
        by: Its replacement; empty removes it.
        whole_words: False replaces it inside of words, too.
        ignore_case: True replaces it in any case.
    """

    edit: Literal["replace"] = "replace"
    text: _Text
    by: _OptionalText = ""
    whole_words: bool = True
    ignore_case: bool = False


class BlacklistEdit(_EditSpec):
    """Removes tags.

    Attributes:
        tags: Globs for whole tags, such as `watermark` or `*background*`.
    """

    edit: Literal["blacklist"] = "blacklist"
    tags: Annotated[_Globs, Field(min_length=1)]


class UnderscoresEdit(_EditSpec):
    """Turns underscores into spaces, except in faces such as `^_^`."""

    edit: Literal["underscores"] = "underscores"


class OrderEdit(_EditSpec):
    """Orders the tags.

    Attributes:
        first: Globs for the tags that come first, in this order.
        rest: Order of the others: as they are, or by the alphabet.
    """

    edit: Literal["order"] = "order"
    first: _Globs = ()
    rest: Literal["keep", "alphabet"] = "keep"


class DeduplicateEdit(_EditSpec):
    """Removes repeated tags, in any case; the first one stays."""

    edit: Literal["deduplicate"] = "deduplicate"


class ImpliedEdit(_EditSpec):
    """Removes the tags that the trigger means, so that the trigger learns them.

    Attributes:
        tags: Globs for such tags (`red hair`).
        share: Tags of at least this share of all captions are removed, too; 0 takes `tags` and the class word only.
    """

    edit: Literal["implied"] = "implied"
    tags: _Globs = ()
    share: float = Field(default=0.0, ge=0.0, le=1.0)


Edit = Annotated[
    PrefixEdit
    | SuffixEdit
    | TriggerEdit
    | ReplaceEdit
    | BlacklistEdit
    | UnderscoresEdit
    | OrderEdit
    | DeduplicateEdit
    | ImpliedEdit,
    Field(discriminator="edit"),
]


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
    from lora_engine.data.caption import add_trigger

    return [add_trigger(text, settings) for text in texts]


def _replace(texts: list[str], edit: ReplaceEdit, _: CaptionSettings) -> list[str]:
    pattern = re.escape(edit.text)
    if edit.whole_words:
        pattern = rf"(?<!\w){pattern}(?!\w)"
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
