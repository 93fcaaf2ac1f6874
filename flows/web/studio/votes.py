"""The tab Votes: pairs of images without names, judged by keyboard, click or touch; and the results.

A client gets the pixels of two images and its position in its own ballot. Which image is whose stays on the server.
"""

from __future__ import annotations

from contextlib import closing
from html import escape
from typing import TYPE_CHECKING, Any, cast, get_args

import gradio

from flows.web.callers import caller_of
from flows.web.studio.page_messages import data_url, show_done, show_error, show_note, show_table
from flows.web.studio.page_style import QUIET
from flows.web.studio.votes_prepare import add_prepare
from lora_engine.errors import WordedError
from registry.errors import VoteError
from registry.versions.versions import Versions
from registry.versions.voting import list_compared, list_comparisons
from tasks.operations.ballots import OpenBallot, VoteAnswer, open_ballot, read_pair, record_answer
from tasks.operations.vote_results import VoteResults, describe_summary, results_of

if TYPE_CHECKING:
    from flows.web.studio.context import Studio

_BUTTONS: tuple[tuple[str, str, str], ...] = (
    ("left", "Left is better", "←"),
    ("tie", "Tie", "↑"),
    ("skip", "Cannot judge", "↓"),
    ("right", "Right is better", "→"),
)
_ON_LOAD = """
let sent = "";
const send = choice => {
  const pair = element.querySelector("[data-position]");
  if (!pair || !pair.querySelector(`[data-vote="${choice}"]`)) return;
  const position = pair.dataset.position;  // a second key before the next pair is shown must not judge that one
  if (choice !== "back" && position === sent) return;
  sent = choice === "back" ? "" : position;
  setTimeout(() => { if (sent === position) sent = ""; }, 3000);
  trigger("select", {choice, position});
};
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-vote]");
  if (button) send(button.dataset.vote);
});
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "skip", Backspace: "back"};
document.addEventListener("keydown", event => {
  const typing = event.target.closest("input, textarea, select, [contenteditable], [role=listbox], [role=tablist]");
  if (!(event.key in keys) || typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (element.offsetParent === null || !element.querySelector("[data-vote]")) return;
  event.preventDefault();
  send(keys[event.key]);
});
"""


def add_votes(studio: Studio) -> None:
    """Adds the tab to the open `gradio.Blocks`."""
    tab = _Votes(studio)
    with gradio.Row():
        chosen = gradio.Dropdown([], label="Comparison", interactive=True, scale=4)
        refresh = gradio.Button("Refresh", scale=0, min_width=110, elem_classes="studio-refresh")
    ballot = gradio.HTML(apply_default_css=False, js_on_load=_ON_LOAD, elem_id="votes-ballot")
    message = gradio.HTML(apply_default_css=False, padding=False)
    with gradio.Accordion("Results", open=False) as results:
        shown = gradio.HTML(apply_default_css=False, padding=False)
    outputs: list[Any] = [ballot, message]
    gradio.on([refresh.click, studio.page.load], tab.list_choices, chosen, [chosen, *outputs], **QUIET)
    chosen.input(tab.open, chosen, outputs, **QUIET)
    ballot.select(tab.vote, chosen, outputs, **QUIET)
    results.expand(tab.show_results, chosen, shown, **QUIET)
    add_prepare(studio, chosen, tab.list_choices, [chosen, *outputs])


class _Votes:
    """The events of the tab.

    Args:
        studio: What the page works with.
    """

    def __init__(self, studio: Studio) -> None:
        self._home = studio.service.home

    def list_choices(self, chosen: str | None, request: gradio.Request) -> tuple[Any, str, str]:
        """Returns the comparisons, the latest first, and opens the chosen one or the first."""
        try:
            with closing(Versions(self._home)) as versions:
                choices = [
                    (f"{entry.candidate} against {entry.against}, {len(entry.prompts)} pairs", entry.artifact.sha256)
                    for version in list_compared(versions)
                    for entry, _ in reversed(list_comparisons(versions, version))
                ]
        except WordedError as error:
            return gradio.skip(), "", show_error(error)
        if not choices:
            empty = "No comparison yet. Prepare one below, or with `loraline vote prepare NAME@REF --prompts FILE`."
            return gradio.update(choices=[], value=None), show_note(empty), ""
        value = chosen if chosen in {digest for _, digest in choices} else choices[0][1]
        return gradio.update(choices=choices, value=value), *self.open(value, request)

    def open(self, chosen: str | None, request: gradio.Request) -> tuple[str, str]:
        """Shows the first pair of a comparison that the user has not judged."""
        if not chosen:
            return "", ""
        try:
            with closing(Versions(self._home)) as versions:
                opened = open_ballot(versions, chosen, actor=caller_of(request).actor)
                return self._show(versions, opened, opened.next_position)
        except WordedError as error:
            return "", show_error(error)

    def vote(self, chosen: str | None, event: gradio.EventData, request: gradio.Request) -> tuple[Any, str]:
        """Records an answer to the pair that is shown, and shows the next one; `back` shows the one before."""
        answer, shown = str(getattr(event, "choice", "")), str(getattr(event, "position", ""))
        try:
            actor = caller_of(request).actor
            with closing(Versions(self._home)) as versions:
                opened = open_ballot(versions, str(chosen or ""), actor=actor)
                position = int(shown) if shown.isascii() and shown.isdecimal() and len(shown) < 7 else -1
                if answer == "back":
                    is_open = 0 < position < len(opened.positions) and not opened.ballot.is_finished
                    return self._show(versions, opened, position - 1 if is_open else opened.next_position)
                if answer not in get_args(VoteAnswer):
                    raise VoteError(f"vote {answer[:40]!r}", allowed=", ".join(get_args(VoteAnswer)))
                record_answer(versions, opened, position, cast("VoteAnswer", answer), actor=actor)
                opened = open_ballot(versions, str(chosen), actor=actor)
                return self._show(versions, opened, opened.next_position)
        except WordedError as error:
            return gradio.skip(), show_error(error)

    def show_results(self, chosen: str | None, request: gradio.Request) -> str:
        """Returns the votes that count, once the user's own ballot is finished: others would sway it."""
        if not chosen:
            return show_note("Choose a comparison.")
        try:
            with closing(Versions(self._home)) as versions:
                opened = open_ballot(versions, chosen, actor=caller_of(request).actor)
                if not opened.ballot.is_finished:
                    return show_note("Results are shown once you have judged every pair of this comparison.")
                (version,) = (v for v in list_compared(versions, chosen) if v.ref == opened.comparison.candidate)
                return _show_results(results_of(versions, version, opened.comparison.against))
        except WordedError as error:
            return show_error(error)

    def _show(self, versions: Versions, opened: OpenBallot, position: int | None) -> tuple[str, str]:
        total, voted = len(opened.positions), len(opened.ballot.choices)
        if position is None:
            return _progress(voted, total), show_done("All pairs are judged. Your votes are final, and count.")
        images = read_pair(versions, opened, position)
        return _pair(opened, position, images) + _progress(voted, total), ""


def _show_results(results: VoteResults) -> str:
    """Returns the votes of a version as HTML."""
    parts = [
        f"<p><b>{escape(results.version.ref)}</b> against {escape(against)}: {escape(describe_summary(summary))}</p>"
        for against, summary in results.against.items()
    ]
    rows = [
        (escape(against), escape(voter), str(rate.votes), _rate(rate.win_rate), _rate(rate.left_rate))
        for against, summary in results.against.items()
        for voter, rate in summary.voters.items()
    ]
    parts.append(show_table(("Against", "Voter", "Votes", "Win rate", "Left"), rows, label="Votes by voter"))
    for alias, reasons in results.unmet.items():
        items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons) or "<li>enough votes</li>"
        parts.append(f"<p>For <b>{escape(alias)}</b>:</p><ul>{items}</ul>")
    return "".join(parts)


def _pair(opened: OpenBallot, position: int, images: tuple[bytes, bytes]) -> str:
    entry = opened.index.pairs[opened.positions[position].pair]
    shown = [
        f'<button data-vote="{side}" aria-label="{side} image is better"><img alt="{side} image" draggable="false" '
        f'src="{data_url(image)}"></button>'
        for side, image in zip(("left", "right"), images, strict=True)
    ]
    keys = "".join(
        f'<button data-vote="{vote}">{label} <kbd aria-hidden="true">{key}</kbd></button>'
        for vote, label, key in _BUTTONS
    )
    back = '<button data-vote="back">Back <kbd>Backspace</kbd></button>' if position else "<span></span>"
    return (
        f'<div data-position="{position}">'
        f'<p class="votes-prompt">Which image fits better? <b>{escape(entry.prompt)}</b></p>'
        f'<div class="votes-pair">{"".join(shown)}</div><div class="votes-keys">{keys}</div>'
        f'<div class="votes-back">{back}<span>Pair {position + 1} of {len(opened.positions)}</span></div></div>'
    )


def _progress(voted: int, total: int) -> str:
    return (
        f'<div class="votes-progress"><progress aria-label="Judged pairs" max="{total}" value="{voted}"></progress>'
        f'<p class="studio-note" role="status">{voted} of {total} pairs judged. Votes count once all are.</p></div>'
    )


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.2f}"
