"""Draws the page of a sweep: its trials, and the Pareto fronts of quality against size and cost. One HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from tasks.operations.changes import show_value
from tasks.sweep.records import pareto_front
from tasks.sweep.spec import SweepSettings, TrialRecord

_WIDTH, _HEIGHT, _MARGIN = 560, 320, 56
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: 0 1rem 1rem 0; max-width: 100%; } svg { max-width: 100%; height: auto; }
tr.winner td { font-weight: 600; } .scroll { overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } svg { background: #eee; } }
"""
_COSTS: tuple[tuple[str, str, Callable[[TrialRecord], float]], ...] = (
    ("size", "adapter, KiB", lambda record: record.size / 1024),
    ("parameters", "values in the adapter", lambda record: float(record.parameters)),
    ("seconds", "seconds of the training", lambda record: record.seconds),
)


def render_sweep(name: str, settings: SweepSettings, records: Sequence[TrialRecord], best: TrialRecord) -> str:
    """Returns the page.

    Args:
        name: Name of the pipeline.
        settings: The sweep.
        records: All trials.
        best: The winner.
    """
    title = escape(f"Sweep of {name}")
    figures = "\n".join(_figure(settings, records, best, *cost) for cost in _COSTS)
    completed = sum(record.state == "completed" for record in records)
    side = "highest" if settings.direction == "maximize" else "lowest"
    paths = [escape(path) for path in settings.parameters]
    head = "".join(f"<th>{text}</th>" for text in ("trial", "state", escape(settings.metric), *paths, *_columns()))
    rows = "\n".join(_row(settings, record, record is best) for record in records)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>Trial {best.number} was chosen among {len(records)} trials ({completed} completed) by the {side}
{escape(settings.metric)}: {best.value:.6g}. Its own value is too good, because it was chosen by it.</p>
{figures}
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></div>
</body></html>
"""


def _columns() -> tuple[str, ...]:
    return ("KiB", "parameters", "seconds", "reason")


def _row(settings: SweepSettings, record: TrialRecord, is_best: bool) -> str:
    value = "" if record.value is None else f"{record.value:.6g}"
    values = [show_value(record.values.get(path)) for path in settings.parameters]
    done = record.state == "completed"
    costs = [f"{record.size / 1024:.1f}", str(record.parameters), f"{record.seconds:.1f}"] if done else [""] * 3
    cells = [(str(record.number), True), (record.state, False), (value, True)]
    cells += [(text, True) for text in (*values, *costs)] + [(record.why, False)]
    shown = "".join(f'<td class="number">{escape(t)}</td>' if n else f"<td>{escape(t)}</td>" for t, n in cells)
    return f'<tr class="winner">{shown}</tr>' if is_best else f"<tr>{shown}</tr>"


def _figure(
    settings: SweepSettings,
    records: Sequence[TrialRecord],
    best: TrialRecord,
    name: str,
    label: str,
    cost: Callable[[TrialRecord], float],
) -> str:
    """Returns a plot of all completed trials, with the line of those that no other one dominates."""
    completed = [record for record in records if record.state == "completed"]
    front = pareto_front(settings, records, cost)
    x = _scale([cost(record) for record in completed], _MARGIN, _WIDTH - 44)
    y = _scale([record.value or 0.0 for record in completed], _HEIGHT - _MARGIN, 16)
    points = {record.number: (x(cost(record)), y(record.value or 0.0)) for record in completed}
    line = " ".join(f"{points[record.number][0]:.1f},{points[record.number][1]:.1f}" for record in front)
    dots = "\n".join(_dots(completed, front, best, points, cost))
    ends, metric = "\n".join(_ends(completed, cost, x, y)), escape(settings.metric)
    return f"""<figure id="{name}"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">
<title>{metric} against {escape(label)}; the line is the Pareto front</title>
<path d="M{_MARGIN} 16V{_HEIGHT - _MARGIN}H{_WIDTH - 44}" fill="none" stroke="#888"/>
<polyline points="{line}" fill="none" stroke="#1b6ca8" stroke-width="1.5"/>
{dots}
{ends}
<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle" font-size="13">{escape(label)}</text>
<text transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle" font-size="13">{metric}</text>
</svg></figure>"""


def _dots(
    completed: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    best: TrialRecord,
    points: dict[int, tuple[float, float]],
    cost: Callable[[TrialRecord], float],
) -> Iterator[str]:
    for record in completed:
        left, top = points[record.number]
        color = "#c0392b" if record is best else "#1b6ca8" if record in front else "#999"
        text = f"trial {record.number}: {record.value:.6g} at {cost(record):.6g}"
        yield f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="{color}"><title>{escape(text)}</title></circle>'


def _ends(
    completed: Sequence[TrialRecord],
    cost: Callable[[TrialRecord], float],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> Iterator[str]:
    costs, values = [cost(record) for record in completed], [record.value or 0.0 for record in completed]
    for number in sorted({min(costs), max(costs)}):
        top = _HEIGHT - _MARGIN + 18
        yield f'<text x="{x(number):.1f}" y="{top}" text-anchor="middle" font-size="12">{number:.5g}</text>'
    for number in sorted({min(values), max(values)}):
        yield f'<text x="{_MARGIN - 6}" y="{y(number) + 4:.1f}" text-anchor="end" font-size="12">{number:.5g}</text>'


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Returns the function that maps the range of some values to a range of the plot."""
    low, high = min(values), max(values)
    span = high - low

    def scale(value: float) -> float:
        return start + (end - start) * ((value - low) / span if span else 0.5)

    return scale
