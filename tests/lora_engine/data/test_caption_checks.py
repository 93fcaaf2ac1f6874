from __future__ import annotations

import pytest

from lora_engine.data.caption_checks import check_captions, has_loop

GOOD = "a brown dog runs over wet sand at sunset"


def kinds(*captions: str) -> list[str]:
    named = {f"{number}.png": text for number, text in enumerate(captions)}
    return [finding.kind for finding in check_captions(named, ("sks", "dog"))]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        ("I'm sorry, I can't help with identifying people in this photo of a beach", "refusal"),
        ("I\u2019m sorry, but I cannot assist with that request today", "refusal"),
        ("As an AI language model I look at beaches and dogs", "refusal"),
        ("a dog on the beach beach beach beach beach near rocks", "loop"),
        ("red hair, blue sky, red hair, blue sky, red hair, blue sky, red hair, blue sky", "loop"),
        (
            "the dog sits near the old tree and the dog sits near the old tree and the dog sits near the old tree",
            "loop",
        ),
        ("Sure, here is a caption: brown dog runs over sand", "introduction"),
        ("The image shows a brown dog on wet sand", "introduction"),
        ("Here's a description of dogs running over sand", "introduction"),
        ("a photo of sks dog", "generic"),
        ("sks dog, grass", "generic"),
    ],
)
def test_a_caption_that_trains_badly_is_found(text: str, kind: str) -> None:
    assert kinds(text, GOOD) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "a man who looks sorry walks beside a very, very old red car",
        "1girl, solo, red hair, red eyes, red dress, blue sky, blue sea",
        "a sign that says no no no beside a wall of bricks",
        "image of the surface of a lake, certainly at dawn",
    ],
)
def test_a_good_caption_is_not(text: str) -> None:
    assert kinds(text, "another text about something else entirely") == []


@pytest.mark.parametrize("size", range(1, 5))
def test_a_loop_is_four_repeats(size: int) -> None:
    sequence = [f"w{number}" for number in range(size)]
    assert not has_loop(" ".join(["begin", *sequence * 3, "end"]))
    assert has_loop(" ".join(["begin", *sequence * 4, "end"]))


def test_captions_that_are_all_alike_are_found() -> None:
    assert kinds(GOOD, GOOD.upper(), "a black cat sleeps on a sofa") == ["alike"]
    assert kinds(GOOD, GOOD, "a black cat sleeps on a sofa", "a grey horse drinks near water") == []
    assert kinds(GOOD) == []


def test_a_finding_names_images_and_what_to_do() -> None:
    named = {f"{number}.png": "" for number in range(5)} | {"good.png": GOOD}
    (finding,) = check_captions(named)
    assert str(finding) == (
        "5 captions are empty (0.png, 1.png, 2.png and 2 more): write one, or set a captioner or a template"
    )
    assert finding.images == ("0.png", "1.png", "2.png", "3.png", "4.png")
