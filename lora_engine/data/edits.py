"""The edits of captions, one ordered list; `lora_engine.data.editing` applies them. Must not import torch.

Edits of tags take a caption as tags separated by commas. Patterns are globs (`*background*`) of bounded length, which
ignore case; there are no regular expressions, so no pattern takes long.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Text = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
_OptionalText = Annotated[str, Field(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Glob = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f,]*$")]
_Globs = Annotated[tuple[_Glob, ...], Field(max_length=500)]


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
