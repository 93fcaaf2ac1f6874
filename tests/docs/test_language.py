"""The language of the repository: banned words in names, comments, texts and pages, and a glossary of public terms."""

from __future__ import annotations

import re
import subprocess
import tokenize
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BANNED = re.compile(
    r"\b(mend(s|ed|ing)?|told|whoever|somebody|a person|stands|lies|(brought|bring|brings) level|goes on|by chance)\b",
    re.IGNORECASE,
)
IMAGE = re.compile(r"\bpictures?\b", re.IGNORECASE)
STORED = {"pictures", "max_pictures", "picture"}
"""Names that mirror stored keys; files and databases of earlier releases have them."""
DATA = {
    "CHANGELOG.md",  # released sections quote what was renamed
    "tools/tiny_base/tokenizer.py",  # the vocabulary of the embedded base
    "lora_engine/training/captions.py",  # caption templates of textual inversion
}


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if name.endswith(suffixes) and name not in DATA]
    return [ROOT / name for name in names if (ROOT / name).is_file() and ROOT / name != Path(__file__)]


def words_of_python(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Gives (line, text, whether it is prose) of names, comments and strings."""
    previous = tokenize.NEWLINE
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string.replace("_", " ") if token.string not in STORED else "", True
            elif token.type == tokenize.COMMENT:
                yield token.start[0], without_code(token.string), True
            elif token.type == tokenize.STRING:
                is_docstring = previous in (
                    tokenize.ENCODING,
                    tokenize.NEWLINE,
                    tokenize.NL,
                    tokenize.INDENT,
                    tokenize.DEDENT,
                )
                yield token.start[0], without_code(token.string), is_docstring and token.string.startswith('"""')
            previous = token.type


def without_code(text: str) -> str:
    """Returns a text without what is in backquotes, quotes, or names an argument of a docstring."""
    return re.sub(r"`[^`]*`|^\s*(max_)?pictures?:", "", text, flags=re.MULTILINE)


def breaches(path: Path) -> list[str]:
    if path.suffix == ".py":
        texts = list(words_of_python(path))
    else:
        page = re.sub(r"```.*?```", lambda block: "\n" * block.group().count("\n"), path.read_text(), flags=re.DOTALL)
        texts = [(number, without_code(line), True) for number, line in enumerate(page.splitlines(), 1)]
    return [
        f"{path}:{line}: {match.group()}"
        for line, text, is_prose in texts
        for pattern in ((BANNED, IMAGE) if is_prose else (BANNED,))
        for match in pattern.finditer(text)
    ]


def test_no_banned_word_is_in_code_comments_texts_or_pages() -> None:
    found = [breach for path in tracked(".py", ".md") for breach in breaches(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.py", '"""Mends it."""\nx = 1  # told by the caller\n', 2),
        ("a.py", "def told_family(): ...\n", 1),
        ("a.py", 'raise ValueError("the file lies there")\n', 1),
        ("a.py", "# a picture\nkeys = {'picture': 1}\n", 1),
        ("a.py", '"""Attributes:\n    pictures: Number of images."""\n', 0),
        ("a.md", "Somebody goes on.\n\n```\ntold\n```\nThe key `pictures`.\n", 2),
    ],
)
def test_the_check_finds_names_comments_and_texts(tmp_path: Path, name: str, text: str, count: int) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert len(breaches(path)) == count


@pytest.mark.parametrize("package", ["lora_engine", "registry"])
def test_every_public_name_is_in_the_glossary(package: str) -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    missing = [name for name in import_module(package).__all__ if not re.search(rf"`[^`]*\b{name}\b[^`]*`", glossary)]
    assert missing == []
