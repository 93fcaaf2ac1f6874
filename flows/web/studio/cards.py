"""Shows registered adapters as cards; a click uses an adapter, or adds its trigger words to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.studio.page_messages import data_url, show_error, show_note
from flows.web.studio.page_style import UNQUEUED
from lora_engine.errors import WordedError
from registry.home import Home
from tasks.operations.adapter_cards import AdapterCard, choose_cards, list_adapter_cards, read_card_sample

if TYPE_CHECKING:
    from flows.web.studio.context import Studio

ALL = "all"
_PAGE_SIZE = 24
_ON_LOAD = """
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-choice]");
  if (button) trigger("select", {choice: button.dataset.choice});
});
"""


class CardList:
    """The cards with search and filter, in the open `gradio.Blocks`.

    Args:
        studio: What the page works with.
    """

    def __init__(self, studio: Studio) -> None:
        self._home = studio.service.home
        with gradio.Row():
            self.search = gradio.Textbox(label="Search adapters", placeholder="name, trigger word, license")
            self.base = gradio.Dropdown([ALL], value=ALL, label="Base or family")
            self.refresh = gradio.Button("Refresh", scale=0, min_width=110, elem_classes="studio-refresh")
        self.html = gradio.HTML(elem_classes="studio-cards", js_on_load=_ON_LOAD)
        inputs, outputs = [self.search, self.base], [self.base, self.html]
        events = [self.search.change, self.base.input, self.refresh.click, studio.page.load]
        gradio.on(events, self._show, inputs, outputs, **UNQUEUED)

    def _show(self, text: str, base: str) -> tuple[Any, str]:
        try:
            cards = list_adapter_cards(self._home)
            names = dict.fromkeys(name for card in cards for name in (card.base, card.family) if name)
            chosen = choose_cards(cards, str(text or ""), "" if base in {None, ALL} else str(base))
            return gradio.update(choices=[ALL, *names]), render_cards(self._home, chosen)
        except WordedError as error:
            return gradio.skip(), show_error(error)

    def find(self, event: gradio.EventData) -> tuple[str, AdapterCard | None]:
        """Returns the action of a click (`use` or `words`), and the card; None if the adapter is gone."""
        action, _, name = str(event.choice).partition(":")
        return action, next((card for card in list_adapter_cards(self._home) if card.name == name), None)


def render_cards(home: Home, cards: Sequence[AdapterCard]) -> str:
    """Returns the first cards as an HTML list, and how many more there are."""
    if not cards:
        return show_note("No adapter. `loraline import` or a pipeline registers one.")
    entries = "".join(_card(home, card) for card in cards[:_PAGE_SIZE])
    more = len(cards) - _PAGE_SIZE
    return f"<ul>{entries}</ul>" + (show_note(f"{more} more: search for them.") if more > 0 else "")


def _card(home: Home, card: AdapterCard) -> str:
    sample = _sample(home, f"{card.name}@{card.shown}")
    title = escape(card.title)
    image = (
        f'<img class="sample" alt="Sample of {title}" src="{sample}">'
        if sample
        else f'<div class="sample" aria-hidden="true">{escape(card.title[:2])}</div>'
    )
    aliases = " ".join(
        f'<span class="alias">{escape(alias)} {version.number}</span>'
        for version in card.versions
        for alias in version.aliases
    )
    name = card.name if card.name != card.title else ""
    about = " · ".join(filter(None, (name, card.base, card.family, card.kind, card.license or "no license stated")))
    count = f"{len(card.versions)} version{'s' if len(card.versions) > 1 else ''}"
    weight = f"recommended weight {card.weight:g}" if card.weight is not None else ""
    facts = " · ".join(filter(None, (count, f"gates of {card.shown}: {card.gates}", weight)))
    words = ", ".join(card.triggers)
    add = _button("words", card, f"Add “{escape(words)}”", f"Add the trigger words of {title}") if words else ""
    return (
        f"<li>{image}<h3>{title}</h3><p>{escape(about)}</p><p>{escape(facts)} {aliases}</p>"
        f'<div class="actions">{_button("use", card, "Use", f"Use {title}", "main")}{add}</div></li>'
    )


def _button(action: str, card: AdapterCard, text: str, label: str, style: str = "") -> str:
    choice = escape(f"{action}:{card.name}")
    return f'<button type="button" class="{style}" aria-label="{label}" data-choice="{choice}">{text}</button>'


@lru_cache(maxsize=512)
def _sample(home: Home, reference: str) -> str | None:
    """Returns the sample of a numbered version, which does not change."""
    try:
        content = read_card_sample(home, reference)
    except WordedError:
        return None
    return None if content is None else data_url(content, "image/webp")
