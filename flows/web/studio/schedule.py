"""The weight of an adapter over the steps: a table of points, a curve, and the prompt's `weight@position`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.step_weights import StepWeights, parse_step_weights

PERCENT, STEPS = "percent of the run", "steps from 0"
UNITS = (PERCENT, STEPS)
SCHEDULE_PRESETS: dict[str, tuple[tuple[float, float], ...]] = {
    "Constant": ((0.0, 1.0),),
    "Fade in": ((0.0, 0.0), (50.0, 1.0)),
    "Fade out": ((50.0, 1.0), (100.0, 0.0)),
    "First half": ((0.0, 1.0), (49.0, 1.0), (50.0, 0.0)),
    "Second half": ((0.0, 0.0), (49.0, 0.0), (50.0, 1.0)),
}
"""Name -> points (percent, share of the adapter's weight)."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 480, 160, 34, 22

_Cell = str | float | int | None


def schedule_weights(rows: Sequence[Sequence[_Cell]], unit: str) -> StepWeights:
    """Returns the weights of a table of (position, weight); empty rows do not count.

    Raises:
        SettingsError: A cell is no number, a position is outside of its range, or there is no row.
    """
    points = []
    for number, row in enumerate(rows, 1):
        cells = ["" if cell is None or str(cell) == "nan" else str(cell).strip() for cell in row]
        if not any(cells):
            continue
        try:
            position, weight = (float(cell) for cell in cells)
        except ValueError:
            raise SettingsError(
                f"row {number} of the schedule is {' | '.join(cells)[:60]!r}", allowed="a position and a weight"
            ) from None
        if not 0 <= position <= (100 if unit == PERCENT else 10_000):
            raise SettingsError(
                f"position {position:g} in row {number} of the schedule",
                allowed="0 to 100 percent" if unit == PERCENT else "steps from 0 to 10000",
            )
        points.append((position / 100 if unit == PERCENT else position, weight))
    if not points:
        raise SettingsError("the schedule is empty", remedy="enter a position and a weight")
    if unit == STEPS and max(position for position, _ in points) <= 1:
        # The syntax reads a list whose last position is at most 1 as shares of the run.
        points.append((2.0, max(points)[1]))
    return parse_step_weights(",".join(f"{weight:.6g}@{position:.6g}" for position, weight in points))


def schedule_rows(weights: StepWeights) -> tuple[list[list[float]], str]:
    """Returns the table of weights, and its unit."""
    if weights.in_steps:
        return [[position, weight] for position, weight in weights.points], STEPS
    return [[round(100 * position, 4), weight] for position, weight in weights.points], PERCENT


def preset_rows(name: str, weight: float) -> list[list[float]]:
    """Returns the table of a preset, in percent, for an adapter with a weight."""
    return [[position, round(share * weight, 4)] for position, share in SCHEDULE_PRESETS[name]]


def draw_curve(weights: StepWeights, steps: int) -> str:
    """Returns the weight in each of the steps as an SVG."""
    steps = min(max(steps, 1), 200)
    values = [weights.at(step, steps) for step in range(steps)]
    low, high = min(0.0, *values), max(1.0, *values)

    def x(step: int) -> float:
        return _LEFT + step / max(steps - 1, 1) * (_WIDTH - _LEFT - 8)

    def y(value: float) -> float:
        return 8 + (high - value) / (high - low) * (_HEIGHT - _BOTTOM - 8)

    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(values))
    dots = "".join(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>' for step, value in enumerate(values))
    marks = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke-opacity=".25"/>'
        f'<text x="{_LEFT - 4}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in dict.fromkeys((low, 0.0, round(high, 3)))
    )
    label = escape(f"Weight per step: {weights}")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" stroke="currentColor" fill="none">'
        f'<g font-size="11" fill="currentColor" stroke-width="1">{marks}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">step 1</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">step {steps}</text></g>'
        f'<polyline points="{line}" stroke="var(--color-accent)" stroke-width="2"/>'
        f'<g fill="var(--color-accent)" stroke="none">{dots}</g></svg>'
    )
