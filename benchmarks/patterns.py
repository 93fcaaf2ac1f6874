"""Measures every regular expression of the packages on repeated texts that may be bad for it.

    python -m benchmarks.patterns [--most 1.4]

The texts repeat up to three characters that the expression mentions, after its first literal characters and before a
character that it does not mention. Listed are expressions whose time grows faster than the text when it is searched
for; one that is only matched against a whole text, or against a text with a bound, may be listed without a fault.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("lora_engine", "registry", "tasks", "flows")
ROOT = Path(__file__).resolve().parents[1]
_SIZES = (1000, 4000)
_LEAST = 2e-3
"""Seconds below which the clock and constant parts decide."""
_EXAMPLES = {"CATEGORY_SPACE": " ", "CATEGORY_WORD": "a", "CATEGORY_DIGIT": "1"}
_CHARACTERS = 7
"""Mentioned characters of which texts are made."""


def find_patterns() -> Iterator[tuple[str, re.Pattern[Any]]]:
    """Yields name and expression of the compiled expressions in all modules of the packages."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            file = ROOT / f"{module.name.replace('.', '/')}.py"
            if not file.is_file() or "re.compile" not in file.read_text() or module.name.endswith("__main__"):
                continue
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, re.Pattern):
                    yield f"{module.name}.{name}", value
                elif isinstance(value, tuple):
                    held = [getattr(entry, "pattern", entry) for entry in value]
                    for number, entry in enumerate(held):
                        if isinstance(entry, re.Pattern):
                            yield f"{module.name}.{name}[{number}]", entry


def parts_of(pattern: re.Pattern[Any]) -> tuple[str, list[str]]:
    """Returns the literal characters with which an expression begins, and some characters that it mentions."""
    text = pattern.pattern
    tree = re._parser.parse(text, pattern.flags & ~re.DEBUG)  # type: ignore[attr-defined]
    start = itertools.takewhile(lambda node: node[0].name == "LITERAL", tree)
    return "".join(chr(node[1]) for node in start), list(dict.fromkeys([" ", *_mentioned(tree)]))[:_CHARACTERS]


def _mentioned(node: Any) -> Iterator[str]:
    kind = getattr(node[0], "name", "") if isinstance(node, tuple) and node else ""
    if kind in ("LITERAL", "NOT_LITERAL"):
        yield chr(node[1])
    elif kind == "RANGE":
        yield chr(node[1][0])
    elif kind == "CATEGORY":
        yield _EXAMPLES.get(node[1].name, " ")
    elif not isinstance(node, int | str | None) and hasattr(node, "__iter__"):
        for part in node:
            yield from _mentioned(part)


def worst_growth(pattern: re.Pattern[Any], search: Callable[[Any], object]) -> tuple[float, float, str]:
    """Returns the largest exponent of the time over the size, the seconds of the larger text, and its description."""
    start, characters = parts_of(pattern)
    units = ["".join(unit) for length in (1, 2, 3) for unit in itertools.product(characters, repeat=length)]
    worst = (0.0, 0.0, "")
    for unit in dict.fromkeys([*units, start]):
        for first, last in itertools.product(dict.fromkeys(("", start)), ("", "\x01")):
            texts = [first + unit * (size // max(1, len(unit))) + last for size in _SIZES]
            seconds = [_seconds(pattern, search, text) for text in texts]
            if seconds[1] > _LEAST:
                exponent = math.log(seconds[1] / max(seconds[0], 1e-6), _SIZES[1] / _SIZES[0])
                worst = max(worst, (exponent, seconds[1], f"{first!r} + {unit!r} * n + {last!r}"))
    return worst


def _seconds(pattern: re.Pattern[Any], search: Callable[[Any], object], text: str) -> float:
    content = text.encode("latin-1", "replace") if isinstance(pattern.pattern, bytes) else text
    began = time.process_time()
    search(content)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=float, default=1.4, help="Largest exponent.")
    arguments = parser.parse_args()
    count = 0
    for name, pattern in find_patterns():
        count += 1
        exponent, seconds, text = worst_growth(pattern, pattern.search)
        if exponent > arguments.most:
            whole = worst_growth(pattern, pattern.fullmatch)[0]
            print(
                f"{name}: exponent {exponent:.2f}, {1000 * seconds:.0f} ms for {text}; as a whole {whole:.2f}",
                flush=True,
            )
    print(f"{count} expressions")


if __name__ == "__main__":
    main()
