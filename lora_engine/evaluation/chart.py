"""Draws the charts of the report as inline SVG, made of numbers only; the page's style sets the colors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 540, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 26, 12, 42
_MAX_POINTS = 400
_DECADES = 4
"""Powers of ten on the axis of spectra; smaller values are on the axis itself."""


def draw_loss(loss: Sequence[Sequence[float]], validation: Sequence[Sequence[float]] = ()) -> Markup | None:
    """Returns the loss curve: raw values thin, running mean bold, validation as dots; None without two finite points.

    Args:
        loss: [step, value] pairs.
        validation: [step, value] pairs.
    """
    raw, heldout = _finite(loss), _finite(validation)
    if len(raw) < 2:
        return None
    smooth = _thin(_running_mean(raw))
    shown = _thin(raw)
    # The first steps may be far above the rest and may be clipped; the running mean and validation may not.
    ordered = sorted(value for _, value in raw)
    top = max(
        [ordered[int(0.99 * (len(ordered) - 1))], *(value for _, value in smooth), *(value for _, value in heldout)]
    )
    x_ticks, y_ticks = nice_ticks(raw[0][0], raw[-1][0]), nice_ticks(0.0, top or 1.0)
    frame = _Frame(raw[0][0], raw[-1][0], max(y_ticks[-1], top))
    parts = [_grid(frame, _labeled(x_ticks), _labeled(y_ticks), "step")]
    parts.append(f'<polyline class="raw" points="{frame.path(shown)}"/>')
    parts.append(f'<polyline class="mean" points="{frame.path(smooth)}"/>')
    if heldout:
        parts.append(f'<polyline class="held" points="{frame.path(heldout)}"/>')
        parts += [_dot(frame, point, "held") for point in heldout]
    return _chart(parts, f"Training loss from {smooth[0][1]:.3g} to {smooth[-1][1]:.3g} over {raw[-1][0]:.0f} steps")


def draw_values(values: Sequence[Sequence[float]], name: str) -> Markup | None:
    """Returns the curve of one measurement over the steps; None without two finite points.

    Args:
        values: [step, value] pairs; values below zero are drawn at zero.
        name: What was measured, in the caller's own words.
    """
    points = _finite(values)
    if len(points) < 2:
        return None
    top = max(value for _, value in points)
    x_ticks, y_ticks = nice_ticks(points[0][0], points[-1][0]), nice_ticks(0.0, top if top > 0.0 else 1.0)
    frame = _Frame(points[0][0], points[-1][0], max(y_ticks[-1], top))
    parts = [_grid(frame, _labeled(x_ticks), _labeled(y_ticks), "step")]
    parts.append(f'<polyline class="mean" points="{frame.path(_thin(points))}"/>')
    return _chart(parts, f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g} over {points[-1][0]:.0f} steps")


def draw_bands(bands: Sequence[tuple[float, Sequence[float]]]) -> Markup | None:
    """Returns the losses by noise level, one line per model, in the style `role-0`, `role-1` and so on.

    Args:
        bands: The middle of each band as a share of the schedule, 0 to 1, and the mean loss of each model. None is
            returned for fewer than two.
    """
    if len(bands) < 2:
        return None
    lines = list(zip(*([(middle, loss) for loss in losses] for middle, losses in bands), strict=True))
    top = max(loss for line in lines for _, loss in line)
    ticks = nice_ticks(0.0, top or 1.0)
    frame = _Frame(0.0, 1.0, max(ticks[-1], top))
    parts = [_grid(frame, [(index / 4, f"{25 * index} %") for index in range(5)], _labeled(ticks), "noise")]
    for index, line in enumerate(lines):
        parts.append(f'<polyline class="role-{index}" points="{frame.path(line)}"/>')
        parts += [
            f'<circle class="role-{index}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in map(frame.project, line)
        ]
    return _chart(parts, f"Losses of {len(lines)} models in {len(bands)} bands of noise")


def draw_spectra(spectra: Sequence[Sequence[float]]) -> Markup | None:
    """Returns the singular values of all modules as shares of the largest of each, on a logarithmic axis.

    Args:
        spectra: Singular values of each module, the largest first. Those without a positive value are left out; None
            is returned if none is left.
    """
    lines = [[value / spectrum[0] for value in spectrum] for spectrum in spectra if spectrum and spectrum[0] > 0.0]
    if not lines:
        return None
    longest = max(2, *map(len, lines))
    frame = _Frame(1.0, float(longest), float(_DECADES))
    x_ticks = _labeled([tick for tick in nice_ticks(1.0, float(longest)) if tick.is_integer()])
    y_ticks = [(float(_DECADES - power), f"{10.0**-power:g}") for power in range(_DECADES + 1)]
    parts = [_grid(frame, x_ticks, y_ticks, "component")]
    for line in lines:
        points = [(index + 1.0, _DECADES + math.log10(max(share, 1e-30))) for index, share in enumerate(line)]
        parts.append(f'<polyline class="spectrum" points="{frame.path(points)}"/>')
    return _chart(parts, f"Singular values of {len(lines)} modules")


def draw_interval(
    difference: float, interval: Sequence[float] | None, better: str, differences: Sequence[float] = ()
) -> Markup:
    """Returns the difference as a dot with its interval, on an axis with zero in the middle and better on the right.

    Args:
        difference: The difference.
        interval: Its interval; None without one.
        better: The better direction: `higher` or `lower`.
        differences: Differences of single groups, as small dots.
    """
    low, high = interval if interval else (difference, difference)
    reach = max(abs(low), abs(high), abs(difference), *map(abs, differences)) or 1.0
    sign = 1.0 if better == "higher" else -1.0

    def project(value: float) -> float:
        return 60.0 + sign * value / reach * 52.0

    left, right = sorted((project(low), project(high)))
    whisker = f'<line class="whisker" x1="{left:.1f}" x2="{right:.1f}" y1="9" y2="9"/>' if interval else ""
    dots = "".join(f'<circle class="group" cx="{project(value):.1f}" cy="9" r="2"/>' for value in differences)
    # Numbers only, as above.
    return Markup(  # noqa: S704
        '<svg class="interval" viewBox="0 0 120 18" aria-hidden="true">'
        '<line class="zero" x1="60" x2="60" y1="1" y2="17"/>'
        f'{whisker}{dots}<circle cx="{project(difference):.1f}" cy="9" r="4"/></svg>'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda size: abs(span / size - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)] or [low, high]


class _Frame:
    def __init__(self, first: float, last: float, top: float) -> None:
        self.first, self.span, self.top = first, (last - first) or 1.0, top or 1.0

    def project(self, point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - self.first) / self.span * (_WIDTH - _LEFT - _RIGHT)
        share = min(max(point[1] / self.top, 0.0), 1.0)
        return x, _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.project, points))


def _dot(frame: _Frame, point: tuple[float, float], style: str) -> str:
    x, y = frame.project(point)
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'


def _labeled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    return [(value, f"{value:g}") for value in ticks]


def _grid(frame: _Frame, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], name: str) -> str:
    floor = _HEIGHT - _BOTTOM
    parts = []
    for value, text in y_ticks:
        _, y = frame.project((frame.first, value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in x_ticks:
        x, _ = frame.project((value, 0.0))
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text class="name" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{name}</text>')
    return "".join(parts)


def _chart(parts: Sequence[str], label: str) -> Markup:
    # Safe to mark as markup: this module builds every part from numbers and its own words.
    return Markup(f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">') + Markup(  # noqa: S704
        "".join(parts) + "</svg>"
    )


def _finite(pairs: Sequence[Sequence[float]]) -> Points:
    points = [(float(pair[0]), float(pair[1])) for pair in pairs if len(pair) == 2]
    return sorted(point for point in points if math.isfinite(point[0]) and math.isfinite(point[1]))


def _running_mean(points: Points) -> Points:
    # Centered, over about a twentieth of the run; the window is cut at the ends.
    reach = max(1, len(points) // 40)
    total = [0.0]
    for _, value in points:
        total.append(total[-1] + value)
    means = []
    for index, (step, _) in enumerate(points):
        start, stop = max(0, index - reach), min(len(points), index + reach + 1)
        means.append((step, (total[stop] - total[start]) / (stop - start)))
    return means


def _thin(points: Points) -> Points:
    if len(points) <= _MAX_POINTS:
        return points
    size = len(points) / _MAX_POINTS
    groups = [points[int(index * size) : int((index + 1) * size)] for index in range(_MAX_POINTS)]
    thinned = [(group[len(group) // 2][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [points[0], *thinned[1:-1], points[-1]]
