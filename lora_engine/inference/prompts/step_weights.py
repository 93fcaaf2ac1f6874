"""Weights of an adapter over the denoising steps, in the syntax of loractl (A1111, Forge, SD.Next): `0@0,1@0.5`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lora_engine.errors import SettingsError

Curve = Literal["linear", "cosine", "hold"]
_MAX_POINTS = 1000
_ALLOWED = "a weight such as 0.7, or points WEIGHT@POSITION such as 0@0,1@0.5"


@dataclass(frozen=True)
class StepWeights:
    """A weight over the denoising steps: a curve between points, constant before the first and after the last.

    Attributes:
        points: Pairs (position, weight), sorted by position.
        in_steps: True if positions are step numbers from 0; False if they are shares of the run, from 0 to 1.
        curve: Between two points, `linear` is loractl's line, `cosine` half a cosine wave, and `hold` the weight of the
            point before, as ComfyUI's keyframes.
    """

    points: tuple[tuple[float, float], ...]
    in_steps: bool = False
    curve: Curve = "linear"

    @property
    def is_constant(self) -> bool:
        """True if every step has the same weight."""
        return len({weight for _, weight in self.points}) == 1

    def at(self, step: int, steps: int) -> float:
        """Returns the weight in a step.

        As in loractl, the share of a step is `step / (steps - 2)`, so the end is reached one step before the last.

        Args:
            step: From 0.
            steps: Number of all steps.
        """
        position = float(step) if self.in_steps else min(step / max(steps - 2, 1), 1.0)
        before = [point for point in self.points if point[0] <= position]
        if not before:
            return self.points[0][1]
        (left, weight), after = before[-1], self.points[len(before) :]
        if not after:
            return weight
        right, next_weight = after[0]
        return weight + (next_weight - weight) * _shape(self.curve, (position - left) / (right - left))

    def __str__(self) -> str:
        if self.is_constant:
            return f"{self.points[0][1]:g}"
        return ",".join(f"{weight:g}@{position:g}" for position, weight in self.points)


ALWAYS = StepWeights(((0.0, 1.0),))
"""The weight 1 in each step."""


def _shape(curve: Curve, share: float) -> float:
    """Returns the share of the way from one weight to the next, from 0 to 1."""
    if curve == "hold":
        return 0.0
    return share if curve == "linear" else (1.0 - math.cos(math.pi * share)) / 2.0


def parse_curve(text: str) -> Curve:
    """Reads the name of a curve.

    Raises:
        SettingsError: There is no such curve.
    """
    curves: Mapping[str, Curve] = {name: name for name in get_args(Curve)}
    if text.strip() not in curves:
        raise SettingsError(f"curve {text[:80]!r}", allowed=", ".join(curves))
    return curves[text.strip()]


def parse_step_weights(text: str, curve: Curve = "linear") -> StepWeights:
    """Reads a weight, or points `WEIGHT@POSITION` (also `~`), separated by commas or semicolons.

    If the largest position is at most 1, positions are shares of the run, otherwise step numbers from 0. A point
    without a position is at 1; if the first one has none, its weight holds for all steps.

    Raises:
        SettingsError: A number is missing or not finite, a position is negative, or there are more than 1,000 points.
    """
    parts = re.split(r"[,;]", text)
    if len(parts) > _MAX_POINTS:
        raise SettingsError(f"{len(parts)} points of a weight", allowed=f"at most {_MAX_POINTS}")
    points: list[tuple[float, float]] = []
    for index, part in enumerate(parts):
        weight, position = _parse_point(part, text)
        if position is None and index == 0:
            points = [(0.0, weight)]
            for rest in parts[1:]:
                _parse_point(rest, text)
            break
        points.append((1.0 if position is None else position, weight))
    points.sort(key=lambda point: point[0])
    return StepWeights(tuple(points), points[-1][0] > 1.0, curve)


def _parse_point(part: str, text: str) -> tuple[float, float | None]:
    weight, at, position = part.replace("~", "@").partition("@")
    if not at:
        return _number(weight, text), None
    if (value := _number(position, text)) < 0:
        raise SettingsError(f"position {value:g} of the weight {text[:80]!r}", allowed="0 or more")
    return _number(weight, text), value


def parse_number(text: str, name: str) -> float:
    """Reads a finite number; `name` is what the error calls it.

    Raises:
        SettingsError: It is none.
    """
    try:
        return _number(text, text)
    except SettingsError:
        raise SettingsError(f"{name} is {text[:80]!r}", allowed="a number") from None


def write_number(number: float) -> str:
    """Returns a number with at most nine decimals and no exponent, which settings of images are read with."""
    return f"{number:.9f}".rstrip("0").rstrip(".")


def _number(part: str, text: str) -> float:
    # A pattern, because Python's numbers also have underscores, `nan` and digits of other scripts.
    match = re.fullmatch(r"\s*([+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})?)\s*", part)
    if match is None or not math.isfinite(value := float(match[1])):
        raise SettingsError(f"{part[:80]!r} of the weight {text[:80]!r} is not a number", allowed=_ALLOWED)
    return value
