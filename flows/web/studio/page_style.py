"""Defines the look of the studio page: fonts of the system, light and dark, narrow screens."""

from __future__ import annotations

from typing import Any

import gradio

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of events that wait in the queue. Only these trigger `change` of a state that they return."""
UNQUEUED: dict[str, Any] = {**QUIET, "queue": False}
"""Options of events that answer at once, also while all images of the queue are drawn."""


def theme() -> gradio.themes.Base:
    """Returns the theme; its fonts are the system's, because others would be loaded from another host."""
    return gradio.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        radius_size="md",
        spacing_size="sm",
    ).set(
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_label_background_fill="none",
        block_label_background_fill_dark="none",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
        block_border_width="1px",
        checkbox_border_color="*neutral_400",
    )


CSS = """
.gradio-container { width: 100% !important; max-width: 1360px !important; margin: 0 auto !important; }
.gradio-container > .main { padding: 1rem; width: 100%; }
.studio-images .grid-wrap { max-height: none; min-height: 0; overflow: visible; padding-top: 2.2rem; }
.studio-images .grid-wrap.fixed-height { min-height: 0; }
.studio-sheet .image-container, .studio-sheet .image-frame { padding-top: 1.2rem; }
.studio-title h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
.studio-title { display: flex; gap: .75rem; align-items: baseline; flex-wrap: wrap; }
.gradio-container { --studio-soft: color-mix(in srgb, var(--body-text-color) 65%, transparent); }
.studio-title p { color: var(--studio-soft); margin: 0; }
.studio-note { color: var(--studio-soft); margin: .25rem 0; }
.studio-small img, .studio-status img, .studio-cards img { image-rendering: pixelated; }
.studio-small .grid-wrap img, .studio-small .preview img { width: 100%; height: 100%; object-fit: contain; }
.studio-status { min-height: 1.6rem; }
.studio-status progress { width: 100%; height: .6rem; accent-color: var(--color-accent); }
.studio-status img { display: block; margin: .5rem auto 0; width: min(100%, 384px); border-radius: var(--radius-md); }
.studio-error { border-left: 4px solid #b3261e; padding: .5rem .75rem; margin: .25rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; background: color-mix(in srgb, #b3261e 9%, transparent); border-radius: 6px; }
.studio-error ul { margin: .25rem 0 0; padding-left: 1.2rem; } .studio-error .fix { margin-top: .35rem; opacity: .85; }
.studio-done { border-left: 4px solid #1a7f4b; padding: .5rem .75rem; margin: .25rem 0; overflow-wrap: anywhere;
  background: color-mix(in srgb, #1a7f4b 10%, transparent); border-radius: 6px; }
.studio-cards ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: .75rem;
  list-style: none; margin: 0; padding: 0; }
.studio-cards li { display: grid; grid-template-columns: 96px 1fr; gap: .25rem .75rem; margin: 0; padding: .6rem;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--background-fill-secondary); align-content: start; }
.studio-cards .sample { grid-row: span 3; width: 96px; height: 96px; object-fit: cover; border-radius: var(--radius-md);
  background: var(--background-fill-primary); display: grid; place-items: center; font-size: 1.6rem; margin: 0;
  color: var(--body-text-color-subdued); }
.studio-cards h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.studio-cards p { margin: 0; font-size: .8rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.studio-cards .actions { display: flex; flex-wrap: wrap; gap: .35rem; grid-column: 1 / -1; margin-top: .25rem; }
.studio-cards button { border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
  padding: .25rem .6rem; font-size: .85rem; background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color); cursor: pointer; min-height: 32px; }
.studio-cards button.main { background: var(--button-primary-background-fill);
  color: var(--button-primary-text-color); border-color: transparent; }
.studio-cards .alias { border: 1px solid var(--color-accent); border-radius: 999px; padding: 0 .45rem;
  color: var(--body-text-color); white-space: nowrap; }
.gradio-container .slider_input_container { min-width: 0; }
.studio-curve svg { width: 100%; height: auto; max-height: 220px; }
.studio-metrics { overflow-x: auto; }
.studio-metrics table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.studio-metrics th, .studio-metrics td { text-align: left; padding: .3rem .6rem;
  border-bottom: 1px solid var(--border-color-primary); }
.studio-adapter { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: .5rem; }
:is(button, input, textarea, select, a, summary, [tabindex]):focus-visible { outline: 3px solid var(--color-accent);
  outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: .5rem !important; }
  .studio-cards ul { grid-template-columns: 1fr; }
}
"""


def image_classes(base: str) -> list[str]:
    """Returns the classes of components with images; those of the embedded base are enlarged without smoothing."""
    return ["studio-images", *(["studio-small"] if base == "tiny" else [])]
