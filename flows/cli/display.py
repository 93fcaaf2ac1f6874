"""Shows a run in progress: a live table with bars on a terminal, one line per event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tasks.progress import StepEvent, listening

_MARKS = {
    "completed": "[green]✓[/]",
    "cached": "[blue]=[/]",
    "skipped": "[dim]-[/]",
    "failed": "[red]✗[/]",
    "started": "…",
    "waiting": "…",
    "progress": "…",
}

_LABELS = {"started": "started", "cached": "cached, verified", "completed": "done", "failed": "FAILED"}


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed and task.total else "", style="dim")


@contextmanager
def show_run(steps: list[str], console: Console) -> Iterator[None]:
    """Shows the events of the steps inside a `with` block.

    Args:
        steps: Names of the steps, in order.
        console: The output console; one that is not a terminal gets plain lines.
    """
    if not console.is_terminal:
        with listening(lambda event: _print_line(event, console)):
            yield
        return
    progress = Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.fields[mark]} [bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
    )
    width = max(map(len, steps))
    rows = {
        name: progress.add_task(name.ljust(width), start=False, total=None, mark=" ", note="waiting") for name in steps
    }
    with progress, listening(lambda event: _update(progress, rows[event.step], event)):
        yield


def _update(progress: Progress, row: TaskID, event: StepEvent) -> None:
    if event.kind == "started":
        progress.start_task(row)
    if event.kind == "drawn":
        progress.console.print(_describe_samples(event), highlight=False, soft_wrap=True)
    elif event.kind == "progress":
        note = format_values(event.values)
        progress.update(row, mark=_MARKS["progress"], total=event.total or None, completed=event.done, note=note)
    elif event.kind in {"started", "waiting", "skipped"}:
        progress.update(row, mark=_MARKS[event.kind], note=event.text)
    elif event.kind in _LABELS:
        progress.start_task(row)
        total = progress.tasks[row].total or 1
        note = {"cached": "cached, verified", "completed": "", "failed": "failed"}[event.kind]
        progress.update(
            row, mark=_MARKS[event.kind], total=total, completed=total if event.kind != "failed" else 0, note=note
        )
        progress.stop_task(row)


_last_tenth: dict[str, int] = {}
_last_time: dict[str, float] = {}
_SECONDS = 2.0
"""Least time between two lines of a step that measures nothing."""


def _print_line(event: StepEvent, console: Console) -> None:
    if event.kind == "progress":
        tenth = 10 * event.done // event.total if event.total else 0
        if not event.total or _last_tenth.get(event.step) == tenth:
            return
        now = time.monotonic()
        if not event.values and now - _last_time.setdefault(event.step, now) < _SECONDS:
            return
        _last_tenth[event.step], _last_time[event.step] = tenth, now
        text = f"{event.step}: {event.done}/{event.total} {format_values(event.values)}"
        console.print(text.rstrip(), highlight=False, soft_wrap=True)
    elif event.kind == "drawn":
        console.print(_describe_samples(event), highlight=False, soft_wrap=True)
    elif event.kind == "skipped":
        console.print(f"{event.step}: skipped: {event.text}", highlight=False, soft_wrap=True)
    elif event.kind in _LABELS or event.kind == "waiting":
        console.print(f"{event.step}: {_LABELS.get(event.kind, event.text)}", highlight=False)


def format_values(values: Mapping[str, float]) -> str:
    """Returns measurements as one short text."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _describe_samples(event: StepEvent) -> str:
    return f"{event.step}: samples of step {event.done} in {event.files[0].parent}"
