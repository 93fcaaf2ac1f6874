"""Describes what a training chose, from its `training.json`, for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def describe_training_choices(training: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields what a training, and the sweep that it won, chose: the setting, its value with figures, the reason."""
    if sweep := training.get("sweep"):
        yield "sweep", f"{sweep['metric']} {_figure(sweep['value'])}", str(sweep["why"])
    if chosen := training.get("chosen"):
        yield "checkpoint", _checkpoint(chosen), str(training.get("candidates", {}).get("why", ""))
    for name, entry in sorted(training.get("automatic", {}).items()):
        losses = [f"{value:g}: {_figure(loss)}" for value, loss in entry.get("losses", ())]
        shares = [f"{block}: {share:.1%}" for block, share, _ in entry.get("blocks", ())]
        figures = ", ".join(losses or shares)
        yield name, f"{entry['chosen']} ({figures})" if figures else str(entry["chosen"]), str(entry.get("why", ""))


def _checkpoint(chosen: Mapping[str, Any]) -> str:
    text = f"step {chosen['step']}, chosen among {len(chosen['from'])} by {chosen['by']} {_figure(chosen['score'])}"
    corrected = chosen.get("leave_one_out")
    return text if corrected is None else f"{text}; corrected for the choice: {_figure(corrected)} (leave-one-out)"


def _figure(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4g}"
