"""Prompt editing and alternation of A1111: `[a:b:0.5]` is a for the first half, `[a|b]` changes each step.

Texts in brackets nest. A bracket without a number or a bar weighs words (`emphasis`) and stays.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_engine.errors import SettingsError

_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}))\s*")
_RANGE = re.compile(rf"{_WHEN.pattern}(?:[,-]{_WHEN.pattern})+")
_CLOSING = {"[": "]", "(": ")"}
_MAX_DEPTH = 100


@dataclass(frozen=True)
class _Edited:
    """`[before:after:when]`: `before` up to and with step `when`, then `after`."""

    before: tuple[_Node, ...]
    after: tuple[_Node, ...]
    when: int


@dataclass(frozen=True)
class _Alternating:
    """`[a|b]`: the options in turn, one per step."""

    options: tuple[tuple[_Node, ...], ...]


@dataclass(frozen=True)
class _When:
    """The steps of a pass, to which positions in brackets refer."""

    steps: int
    is_enlarged: bool

    def step_of(self, position: str) -> int:
        """Returns the last step of the first text; a number with a point is a share of the steps."""
        value = float(position)
        if "." in position:
            return min(self.steps, int((value - 1.0 if self.is_enlarged else value) * self.steps))
        return min(self.steps, int(value - self.steps if self.is_enlarged else value))


_Node = str | _Edited | _Alternating


def texts_by_step(prompt: str, steps: int, *, is_enlarged: bool = False) -> list[tuple[int, str]]:
    """Returns the texts of a prompt over the steps.

    Args:
        prompt: The prompt, without adapter tags.
        steps: Number of denoising steps.
        is_enlarged: True for the second pass over enlarged images, in which positions count on from the end of the
            first: `[a:b:1.5]` changes at half of it, and `[a:b:0.5]` is b.

    Returns:
        Pairs (last step with the text, text), steps from 1; neighbors differ. The last one ends with the last step.

    Raises:
        SettingsError: A bracket has both bars and colons, which other programs read in another way, or more than 100
            brackets are open at once; names the position.
    """
    nodes = _parse(prompt, steps, is_enlarged=is_enlarged)
    texts: list[tuple[int, str]] = []
    for step in range(1, steps + 1) if any(not isinstance(node, str) for node in nodes) else (steps,):
        text = _text_at(nodes, step)
        if texts and texts[-1][1] == text:
            texts.pop()
        texts.append((step, text))
    return texts


def edits_over(prompt: str, mark: str) -> int | None:
    """Returns the number, from 0, of the first `mark` in a bracket that edits or alternates; None if none is in one.

    Args:
        prompt: A prompt.
        mark: A character.
    """
    number = 0
    for node in _parse(prompt, 1):
        if not isinstance(node, str):
            # Edits are read inside out, so the marks of one bracket are in order.
            if mark in _all_text(node):
                return number
            continue
        number += node.count(mark)
    return None


def _all_text(node: _Node) -> str:
    if isinstance(node, str):
        return node
    branches = (node.before, node.after) if isinstance(node, _Edited) else node.options
    return "".join(_all_text(inner) for branch in branches for inner in branch)


def _text_at(nodes: Sequence[_Node], step: int) -> str:
    parts: list[str] = []
    for node in nodes:
        if isinstance(node, str):
            parts.append(node)
        elif isinstance(node, _Edited):
            parts.append(_text_at(node.before if step <= node.when else node.after, step))
        else:
            parts.append(_text_at(node.options[(step - 1) % len(node.options)], step))
    return "".join(parts)


def _parse(prompt: str, steps: int, *, is_enlarged: bool = False) -> tuple[_Node, ...]:
    tokens = [(match[0], match.start()) for match in _TOKEN.finditer(prompt)]
    # Parts of the open brackets, split at colons and bars; the first entry is the whole prompt.
    open_at: list[tuple[str, int, list[list[_Node]], list[str]]] = [("", 0, [[]], [])]
    for token, position in tokens:
        _, _, parts, separators = open_at[-1]
        if token in _CLOSING:
            if len(open_at) > _MAX_DEPTH:
                raise SettingsError(
                    f"more than {_MAX_DEPTH} open brackets in {prompt[:80]!r}",
                    where=f"character {position + 1}",
                    remedy="close them, or write a backslash before brackets that are text",
                )
            open_at.append((token, position, [[]], []))
        elif token in {":", "|"} and len(open_at) > 1:
            parts.append([])
            separators.append(token)
        elif len(open_at) > 1 and token == _CLOSING[open_at[-1][0]]:
            bracket, start, parts, separators = open_at.pop()
            place = f"character {start + 1}"
            open_at[-1][2][-1] += _closed(bracket, parts, separators, _When(steps, is_enlarged), place)
        else:
            parts[-1].append(token)
    # Unclosed brackets are text.
    while len(open_at) > 1:
        bracket, _, parts, separators = open_at.pop()
        open_at[-1][2][-1] += _as_text(bracket, parts, separators)
    return _joined(open_at[0][2][0])


def _closed(bracket: str, parts: list[list[_Node]], separators: list[str], when: _When, place: str) -> list[_Node]:
    if bracket == "[" and "|" in separators:
        if ":" in separators:
            raise SettingsError(
                "a bracket has both '|' and ':', which programs read differently",
                where=place,
                allowed="[a|b] to alternate, [a:b:0.5] to change once",
                remedy="nest one bracket in the other",
            )
        return [_Alternating(tuple(map(_joined, parts)))]
    if bracket == "[" and separators and all(isinstance(node, str) for node in parts[-1]):
        last = "".join(node for node in parts[-1] if isinstance(node, str))
        if _RANGE.fullmatch(last) or parts[0] == ["SEQ"]:
            raise SettingsError(
                "a bracket has several positions, as in ComfyUI's prompt-control",
                where=place,
                allowed="[a:b:0.5], which changes once",
                remedy="nest brackets, such as [a:[b:c:0.7]:0.3]",
            )
        if len(separators) <= 2 and (match := _WHEN.fullmatch(last)):
            before = parts[0] if len(parts) == 3 else []
            return [_Edited(_joined(before), _joined(parts[-2]), when.step_of(match[1]))]
    return [*_as_text(bracket, parts, separators), _CLOSING[bracket]]


def _as_text(bracket: str, parts: list[list[_Node]], separators: list[str]) -> list[_Node]:
    nodes: list[_Node] = [bracket, *parts[0]]
    for separator, part in zip(separators, parts[1:], strict=True):
        nodes += [separator, *part]
    return nodes


def _joined(nodes: Sequence[_Node]) -> tuple[_Node, ...]:
    joined: list[_Node] = []
    for is_text, run in itertools.groupby(nodes, key=lambda node: isinstance(node, str)):
        group = list(run)
        joined += ["".join(map(str, group))] if is_text else group
    return tuple(joined)
