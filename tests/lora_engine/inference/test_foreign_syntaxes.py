"""Syntaxes of other programs are named with their place, instead of being drawn as words."""

from __future__ import annotations

import pytest

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.prompt import parse_prompt


@pytest.mark.parametrize(
    ("text", "hit", "meaning", "remedy"),
    [
        ("a {zorb}", "{zorb}", "NovelAI's emphasis", "(text:1.05)"),
        ("a {{red}} zorb", "{red}", "NovelAI's emphasis", "(text:1.05)"),
        ("a 1.2::red zorb:: here", "1.2::", "NovelAI's weight", "(text:1.2)"),
        ("a -1::fog", "-1::", "NovelAI's weight", "(text:1.2)"),
        ("a {red|green} zorb", "{red|green}", "random choice", "[a|b]"),
        ("a {2$$red|green} zorb", "{2$$red|green}", "random choice", "[a|b]"),
        ("a (red)++ zorb", ")++", "InvokeAI's weight", "(text:1.1)"),
        ("a (red)-", ")-", "InvokeAI's weight", "(text:1.1)"),
        ("a (red zorb)1.3, here", ")1.3", "InvokeAI's weight", "(text:1.1)"),
        ("a zorb++ here", "zorb++", "InvokeAI's weight", "(text:1.2)"),
        ('("a zorb", "a cube").blend(1, 1)', ").blend(", "InvokeAI's function", "AND"),
        ("a __color__ zorb", "__color__", "a wildcard", "-x"),
        ("a __sd/*color__ zorb", "__sd/*color__", "a wildcard", "-x"),
        ("a embedding:zorb", "embedding:", "ComfyUI's learned token", "<lora:FILE>"),
        ("a zorb MASK(0 0.5)", "MASK(", "a region", "--region"),
        ("a zorb COUPLE(0 1) b", "COUPLE(", "a region", "--region"),
        ("AVG(a, b)", "AVG(", "a function", "remove it"),
        ("a room ADDCOMM a zorb", "ADDCOMM", "Regional Prompter", "--region"),
        ("a <segment:face> b", "<segment:face>", "a second pass|second pass", "--mask"),
        ("a <region:0,0,1,1> b", "<region:0,0,1,1>", "a part of the image", "--region"),
        ("a <fromto[0.5]:b,c>", "<fromto[0.5]:b,c>", "prompt editing", "[a:b:0.5]"),
        ("a <random:b,c>", "<random:b,c>", "random choice", "-x"),
        ("a <wildcard:color>", "<wildcard:color>", "a wildcard", "-x"),
        ("a <embed:zorb>", "<embed:zorb>", "learned token", "<lora:FILE>"),
        ("a <hypernet:z:1>", "<hypernet:z:1>", "a hypernetwork", "a LoRA"),
        ("a <unknown:z>", "<unknown:z>", "<unknown:z>", "remove it"),
    ],
)
def test_a_syntax_of_another_program_is_named_with_its_place(text: str, hit: str, meaning: str, remedy: str) -> None:
    with pytest.raises(SettingsError, match=meaning) as caught:
        parse_prompt(text)
    assert f"character {text.index(hit) + 1}" in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a zorb, 3:2, 10:30, at 12::",
        "[at 5::4]",
        "[a::4] b",
        "[1::0.5]",
        "a C++ book",
        "(red:1.2), (blue)-green cube",
        "a snake_case_name and __init",
        "MASK and AREA, a STYLE",
        "an embedding: of a zorb",
        "a <s1> zorb <zorb>",
        "a { zorb",
        "a (red) 3 cubes",
        "a (red)3d cube",
    ],
)
def test_texts_that_only_resemble_another_syntax_are_read(text: str) -> None:
    assert parse_prompt(text).text == text


def test_an_escaped_brace_is_text() -> None:
    assert parse_prompt(r"a \{red|blue\} zorb").text == "a {red|blue} zorb"


def test_names_of_files_are_no_prompt() -> None:
    (tag,) = parse_prompt("a <lora:lora__v1__{x}/zorb++.safetensors:0.5>").adapters
    assert tag.name == "lora__v1__{x}/zorb++.safetensors"


@pytest.mark.parametrize(
    ("piece", "problem"),
    [
        ("{", ""),
        ("{|", ""),
        ("1::[", "open brackets"),
        ("__", ""),
        ("a ( ", "open brackets"),
        ("embedding: ", ""),
        ("<a", ""),
        ("[<lora:a>", "open brackets"),
        ("ab+ ", ""),
    ],
)
def test_a_prompt_of_many_openings_is_read_or_refused(piece: str, problem: str) -> None:
    """A pattern without bounds would take minutes for it, which ends in the suite's time limit."""
    text = piece * (200_000 // len(piece))
    if problem:
        with pytest.raises(SettingsError, match=problem):
            parse_prompt(text)
    else:
        assert parse_prompt(text).text == text.strip()
