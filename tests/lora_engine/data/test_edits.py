from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lora_engine.data.editing import edit_captions
from lora_engine.data.spec import CaptionSettings


def edit(texts: list[str], *edits: dict[str, Any], **settings: Any) -> list[str]:
    spec = CaptionSettings(edits=edits, **settings)
    return edit_captions(texts, spec.edits, spec)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        ({"edit": "prefix", "text": "photo"}, "a dog", "photo, a dog"),
        ({"edit": "prefix", "text": "photo"}, "", "photo"),
        ({"edit": "suffix", "text": "4k"}, "a dog", "a dog, 4k"),
        ({"edit": "replace", "text": "The image shows ", "whole_words": False}, "The image shows a dog", "a dog"),
        ({"edit": "replace", "text": "dog", "by": "cat"}, "a dog, Dog, dogs", "a cat, Dog, dogs"),
        ({"edit": "replace", "text": "DOG", "by": "cat", "ignore_case": True}, "a dog, dogs", "a cat, dogs"),
        ({"edit": "replace", "text": "dog", "by": r"\1{x}"}, "a dog", r"a \1{x}"),
        ({"edit": "replace", "text": ".*", "by": "x", "whole_words": False}, "a.*b", "axb"),
        ({"edit": "blacklist", "tags": ["*background*", "WATERMARK"]}, "dog, simple Background, watermark", "dog"),
        ({"edit": "underscores"}, "long_hair, ^_^, o_o, a_b c_d", "long hair, ^_^, o_o, a b c d"),
        ({"edit": "order", "first": ["1girl", "*hair"]}, "sky, red hair, 1girl, sea", "1girl, red hair, sky, sea"),
        ({"edit": "order", "first": ["b"], "rest": "alphabet"}, "d, b, C, a", "b, a, C, d"),
        ({"edit": "deduplicate"}, "Dog, sky, dog, sky", "Dog, sky"),
        ({"edit": "implied", "tags": ["red *"]}, "red hair, sky", "sky"),
    ],
)
def test_an_edit_changes_a_caption(change: dict[str, Any], before: str, after: str) -> None:
    assert edit([before], change) == [after]


def test_edits_are_made_in_their_order() -> None:
    first, second = {"edit": "replace", "text": "a", "by": "b"}, {"edit": "replace", "text": "b", "by": "c"}
    assert edit(["a"], first, second) == ["c"]
    assert edit(["a"], second, first) == ["b"]


def test_the_trigger_is_put_where_its_edit_is() -> None:
    trigger, suffix = {"edit": "trigger"}, {"edit": "prefix", "text": "photo"}
    assert edit(["red", "sks"], trigger, suffix, trigger="sks") == ["photo, a sks, red", "photo, sks"]


def test_what_the_trigger_means_is_removed() -> None:
    texts = ["sks, dog, brown eyes, grass", "sks, dog, brown eyes, snow", "dog, brown eyes, sky, sks"]
    assert edit(texts, {"edit": "implied"}, class_word="dog", trigger="sks") == [
        "sks, brown eyes, grass",
        "sks, brown eyes, snow",
        "brown eyes, sky, sks",
    ]
    assert edit(texts, {"edit": "implied", "share": 0.9}, class_word="dog", trigger="sks") == [
        "sks, grass",
        "sks, snow",
        "sky, sks",
    ]
    # Of a single image, every tag is common.
    assert edit(["red, sky"], {"edit": "implied", "share": 0.9}) == ["red, sky"]
    assert edit(["a*b, axb"], {"edit": "implied"}, class_word="a*b") == ["axb"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edit": "remove"}, "'prefix', 'suffix', 'trigger', 'replace'"),
        ({"edit": "prefix"}, "text"),
        ({"edit": "prefix", "text": "a\nb"}, "text"),
        ({"edit": "prefix", "text": "x" * 501}, "text"),
        ({"edit": "blacklist", "tags": []}, "tags"),
        ({"edit": "blacklist", "tags": ["x" * 101]}, "tags"),
        ({"edit": "implied", "share": 1.5}, "share"),
        ({"edit": "order", "rest": "random"}, "rest"),
    ],
)
def test_invalid_edits_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CaptionSettings(edits=[change])


def test_globs_of_many_stars_are_matched_at_once() -> None:
    # A backtracking matcher would take longer than the universe exists.
    assert edit([f"{'a' * 1_900}, sky"], {"edit": "blacklist", "tags": ["*a" * 45 + "*b"]}) == [f"{'a' * 1_900}, sky"]


def test_existing_is_refused_for_captioners_that_do_not_look() -> None:
    with pytest.raises(ValidationError, match="existing 'replace' belongs to captioners that look at images"):
        CaptionSettings(existing="replace")
