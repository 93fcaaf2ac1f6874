from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_engine.seeds import generator
from lora_engine.training.captions import OBJECT_TEMPLATES, STYLE_TEMPLATES, Rewriter, expand_wildcards
from lora_engine.training.specs.captions import Captions

CAPTION = "sks, star, red, small, on white"


def rewrite_often(settings: Captions, caption: str = CAPTION, count: int = 200) -> list[str]:
    rewriter = Rewriter(settings)
    return [rewriter.rewrite(caption, generator(7, "caption", number)) for number in range(count)]


@given(st.text(max_size=60))
def test_by_default_no_caption_changes(caption: str) -> None:
    rewriter = Rewriter(Captions())
    assert rewriter.rewrite(caption, generator(0, "x")) == rewriter.rewrite(caption) == caption
    assert not rewriter.varies(caption)


def test_shuffling_keeps_all_tags_and_the_position_of_the_first() -> None:
    texts = rewrite_often(Captions(shuffle=True, keep_tokens=2))
    assert all(text.startswith("sks, star, ") for text in texts)
    assert {tuple(sorted(text.split(", "))) for text in texts} == {tuple(sorted(CAPTION.split(", ")))}
    # All six orders of the other three, about equally often.
    counts = Counter(texts)
    assert len(counts) == 6
    assert min(counts.values()) > 15
    assert {text.split(", ")[0] for text in rewrite_often(Captions(shuffle=True))} == set(CAPTION.split(", "))


@pytest.mark.parametrize("shuffle", [False, True])
def test_tags_are_dropped_at_the_set_share_and_leading_ones_never(shuffle: bool) -> None:
    texts = rewrite_often(Captions(tag_dropout=0.25, keep_tokens=1, shuffle=shuffle), count=500)
    assert all(text.split(", ")[0] == "sks" for text in texts)
    left = sum(len(text.split(", ")) - 1 for text in texts) / (500 * 4)
    assert left == pytest.approx(0.75, abs=0.03)
    if not shuffle:
        order = CAPTION.split(", ")
        assert all(sorted(text.split(", "), key=order.index) == text.split(", ") for text in texts)
    assert set(rewrite_often(Captions(tag_dropout=1.0))) == {""}


def test_draws_depend_on_the_generator_only() -> None:
    settings = Captions(shuffle=True, tag_dropout=0.3, templates="object")
    assert rewrite_often(settings) == rewrite_often(settings)
    rewriter = Rewriter(settings)
    assert rewriter.rewrite(CAPTION, generator(8, "caption", 0)) != rewriter.rewrite(
        CAPTION, generator(7, "caption", 0)
    )


@pytest.mark.parametrize(("name", "known"), [("object", OBJECT_TEMPLATES), ("style", STYLE_TEMPLATES)])
def test_templates_contain_the_caption(name: Any, known: tuple[str, ...]) -> None:
    texts = rewrite_often(Captions(templates=name), "a zorb")
    assert set(texts) == {template.replace("{}", "a zorb") for template in known}
    assert all(template.count("{}") == 1 for template in known)
    own = rewrite_often(Captions(templates=("one {}", "two {}"), prefix="<", suffix=">"), "zorb")
    assert set(own) == {"<one zorb>", "<two zorb>"}


def test_a_caption_may_contain_braces() -> None:
    assert rewrite_often(Captions(templates=("see {} here",)), "a {} b {0}", 1) == ["see a {} b {0} here"]


def test_replacements_replace_every_occurrence() -> None:
    settings = Captions(replacements={"sks": ("zorb", "blik"), "red": ("scarlet",)})
    assert set(rewrite_often(settings, "sks and sks, red")) == {"zorb and zorb, scarlet", "blik and blik, scarlet"}
    assert rewrite_often(settings, "nothing", 1) == ["nothing"]


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a {red|blue} star", {"a red star", "a blue star"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|b {c|d}}", {"a", "b c", "b d"}),
        ("{|very }big", {"big", "very big"}),
        ("a {b} c", {"a {b} c"}),
        ("{a|b", {"{a|b"}),
        ("a|b} {", {"a|b} {"}),
        ("{a {b|c", {"{a {b|c"}),
    ],
)
def test_wildcards_become_each_of_their_parts_and_other_braces_stay(text: str, possible: set[str]) -> None:
    texts = {expand_wildcards(text, generator(1, "w", number)) for number in range(60)}
    assert texts == possible
    assert expand_wildcards(text) in possible


@given(st.text(alphabet="ab{}|", max_size=24), st.integers(0, 5))
def test_wildcards_never_fail_and_leave_text_without_a_choice_alone(text: str, seed: int) -> None:
    texts = expand_wildcards(text, generator(seed, "w"))
    if "|" not in text:
        assert texts == text


@pytest.mark.parametrize(
    ("settings", "still"),
    [
        (Captions(shuffle=True, tag_dropout=0.5, prefix="p "), f"p {CAPTION}"),
        (Captions(templates="object"), f"a photo of a {CAPTION}"),
        (Captions(replacements={"red": ("blue", "green")}), CAPTION.replace("red", "blue")),
    ],
)
def test_without_a_generator_nothing_is_drawn(settings: Captions, still: str) -> None:
    assert Rewriter(settings).rewrite(CAPTION) == still


@pytest.mark.parametrize(
    ("change", "caption", "varies"),
    [
        ({"shuffle": True}, "a, b", True),
        ({"shuffle": True}, "alone", False),
        ({"shuffle": True, "keep_tokens": 1}, "a, b", False),
        ({"tag_dropout": 0.1}, "alone", True),
        ({"tag_dropout": 0.1, "keep_tokens": 1}, "alone", False),
        ({"templates": ("only {}",)}, "a, b", False),
        ({"templates": "style"}, "a", True),
        ({"wildcards": True}, "{a|b}", True),
        ({"wildcards": True}, "a|b", False),
        ({"replacements": {"a": ("x", "y")}}, "a", True),
        ({"replacements": {"a": ("x", "y")}}, "b", False),
        ({"prefix": "x"}, "a, b", False),
        ({"shuffle": True, "keep_separator": "|||"}, "a, b ||| c ||| d, e", False),
        ({"shuffle": True, "keep_separator": "|||"}, "a ||| c, b", True),
        ({"shuffle": True, "secondary_separator": ";;;"}, "a;;;b", False),
    ],
)
def test_varies_is_true_if_there_are_several_texts(change: dict[str, Any], caption: str, varies: bool) -> None:
    settings = Captions(**change)
    assert Rewriter(settings).varies(caption) is varies
    assert (len(set(rewrite_often(settings, caption))) > 1) is varies


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"templates": ("no braces",)}, r"must contain \{\} once"),
        ({"templates": ("{} and {}",)}, r"must contain \{\} once"),
        ({"templates": ("{word}",)}, r"must contain \{\} once"),
        ({"templates": "subject"}, "object"),
        ({"tag_dropout": 1.5}, "tag_dropout"),
        ({"separator": ""}, "separator"),
        ({"chunks": 0}, "chunks"),
        ({"colours": {"variants": 0}}, "drawn anew in each step is not supported"),
        ({"prefix": "a\nb"}, "prefix"),
        ({"shufle": True}, "shufle"),
        ({"keep_separator": "||", "secondary_separator": "|"}, "contain each other"),
        ({"keep_separator": "a, b"}, "contain each other"),
        ({"secondary_separator": ""}, "secondary_separator"),
        ({"first_tags": 3}, "set tag_warmup"),
        ({"tag_warmup": -1}, "tag_warmup"),
        ({"dropout_every": -1}, "dropout_every"),
    ],
)
def test_invalid_settings_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Captions.model_validate(change)


def test_a_keep_separator_fixes_both_ends_and_is_removed() -> None:
    # The example of sd-scripts' documentation.
    caption = "aaa, bbb ||| ccc, ddd, eee, fff ||| ggg, hhh"
    texts = rewrite_often(Captions(shuffle=True, tag_dropout=0.2, keep_separator="|||", keep_tokens=4), caption)
    assert all(text.startswith("aaa, bbb") and text.endswith("ggg, hhh") and "|" not in text for text in texts)
    assert len(set(texts)) > 20
    assert Rewriter(Captions(keep_separator="|||")).rewrite(caption) == "aaa, bbb, ccc, ddd, eee, fff, ggg, hhh"
    one = rewrite_often(Captions(shuffle=True, keep_separator="|||"), "aaa ||| ccc, ddd")
    assert set(one) == {"aaa, ccc, ddd", "aaa, ddd, ccc"}
    without = rewrite_often(Captions(shuffle=True, keep_separator="|||", keep_tokens=1), "a, b, c")
    assert set(without) == {"a, b, c", "a, c, b"}


def test_a_secondary_separator_keeps_tags_together() -> None:
    texts = rewrite_often(Captions(shuffle=True, tag_dropout=0.5, secondary_separator=";;;"), "a;;;b, c, d;;;e")
    assert all(("a" in text) == ("a, b" in text) and ("e" in text) == ("d, e" in text) for text in texts)
    assert {"", "a, b, c, d, e"} < set(texts)
    assert Rewriter(Captions(secondary_separator=";;;")).rewrite("a;;;b, c") == "a, b, c"


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_tag_warmup_adds_tags_step_by_step(shuffle: bool) -> None:
    rewriter = Rewriter(Captions(shuffle=shuffle, keep_tokens=1, tag_warmup=10, first_tags=2))
    caption = ", ".join("abcdefg")
    texts = [rewriter.rewrite(caption, generator(7, "caption", step), step) for step in range(12)]
    # sd-scripts: floor(step (tags - minimum) / steps) + minimum, of the tags that may move.
    assert [len(text.split(", ")) for text in texts] == [1 + 2 + step * 4 // 10 for step in range(10)] + [7, 7]
    assert all(text.startswith("a") for text in texts)
    assert (texts[0] == "a, b, c") != shuffle
    assert rewriter.rewrite(caption) == caption
    assert rewriter.varies(caption)
    few = Rewriter(Captions(tag_warmup=10, first_tags=5))
    assert few.rewrite("a, b", generator(0, "x"), 0) == "a, b"
