from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.emphasis import parse_weights


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("a ((cat)) b", [("a ", 1.0), ("cat", 1.1 * 1.1), (" b", 1.0)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("(cat:1.3), dog", [("cat", 1.3), (", dog", 1.0)]),
        ("(a cat: 0.5 )", [("a cat", 0.5)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        (r"a \(cat\) \\", [("a (cat) \\", 1.0)]),
        ("at 10:30 :)", [("at 10:30 :)", 1.0)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a (cat and dog", [("a ", 1.0), ("cat and dog", 1.1)]),
        ("x:1.3)", [("x:1.3)", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("(a:1.3)(b)", [("a", 1.3), ("b", 1.1)]),
        ("(a:1.)", [("a", 1.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *(("a ", 1.0), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1.0), (" a ", 1.1)),
                *(("hill", 0.55), (", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1)),
            ],
        ),
        ("()", [("", 1.0)]),
    ],
)
def test_brackets_weigh_as_in_a1111(text: str, pieces: list[tuple[str, float]]) -> None:
    parsed = parse_weights(text)
    assert [piece for piece, _ in parsed] == [piece for piece, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])


@given(st.text(alphabet="ab ,:.1()[]\\", max_size=40))
def test_no_letter_is_lost_or_added(text: str) -> None:
    parsed = "".join(piece for piece, _ in parse_weights(text))
    assert re.sub(r"[^ab]", "", parsed) == re.sub(r"[^ab]", "", text)


@given(st.text(max_size=40).filter(lambda text: not set(text) & set("()[]\\")))
def test_a_text_without_brackets_is_one_unchanged_piece(text: str) -> None:
    assert parse_weights(text) == [(text, 1.0)]


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(SettingsError, match="a weight that is not finite"):
        parse_weights(f"(a:{'9' * 400})")


def test_the_depth_of_brackets_is_bounded():
    """Each level multiplies all pieces in it, so without a bound n open brackets cost n * n multiplications."""
    deepest = parse_weights("(a" * 100)
    assert deepest[-1][1] == pytest.approx(1.1**100)
    for bracket in "([":
        with pytest.raises(SettingsError, match=r"more than 100 open brackets .*character 201: |character 201: .*100"):
            parse_weights(f"{bracket}a" * 60_000)
    assert len(parse_weights("(a) b " * 1000)) == 2000, "the depth counts, not the number"
