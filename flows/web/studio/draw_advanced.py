"""The section Advanced of the tab Draw; its fields have the names of the options of `loraline generate`."""

from __future__ import annotations

from typing import Any

import gradio


def add_advanced() -> dict[str, Any]:
    """Adds the section to the open `gradio.Blocks`, and returns its components by their names in `DrawForm`."""
    with gradio.Accordion("Advanced", open=False):
        regions = gradio.Textbox(
            label="Regions",
            info="One a line: LEFT,TOP,RIGHT,BOTTOM=PROMPT. The box is in shares of the image, such as "
            "0,0,0.5,1=a red cube <lora:NAME:0.8> for its left half. The rest is drawn from the whole prompt.",
            placeholder="0,0,0.5,1=a red cube",
            lines=2,
            max_lines=8,
        )
        with gradio.Row():
            feather = gradio.Slider(
                0, 256, 0, step=1, label="Feather", info="Blur of the regions' borders in pixels", min_width=190
            )
            only_regions = gradio.Checkbox(
                False, label="Only regions", info="Keep the other pixels of the image to start from", min_width=190
            )
        with gradio.Row():
            adapter_guidance = gradio.Number(
                1,
                label="Adapter guidance",
                info="1 is the prediction with the adapters, 0 that without; above 1 goes further",
                step=0.1,
                min_width=190,
            )
            clip_skip = gradio.Number(
                None,
                label="Clip skip",
                info="Layer of the text encoders from the last; empty is that of the training",
                precision=0,
                minimum=1,
                min_width=190,
            )
        with gradio.Row():
            variation = gradio.Textbox(
                label="Variation",
                info="SEED:STRENGTH: mixes in the noise of another seed, such as 8:0.2",
                min_width=190,
            )
            seed_size = gradio.Textbox(
                label="Seed size", info="WIDTHxHEIGHT: puts the noise of this size into the middle", min_width=190
            )
    return {
        "regions": regions,
        "feather": feather,
        "only_regions": only_regions,
        "adapter_guidance": adapter_guidance,
        "variation": variation,
        "seed_size": seed_size,
        "clip_skip": clip_skip,
    }
