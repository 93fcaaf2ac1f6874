"""The model card of the embedded base, and the figures in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from lora_engine.bases.tiny.stage import BuildSettings
from lora_engine.bases.tiny.world import BACKGROUNDS, COLOURS, CONCEPT, POSITIONS, SHAPES, TEXTURES, held_out_triples
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write

FIGURES = "measured.json"

_CARD = Template("""\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, toy-model, synthetic-data]
---
# The embedded base of Loraline

A real Stable Diffusion in small: `AutoencoderKL`, `CLIPTextModel`, `UNet2DConditionModel`, a CLIP tokenizer and a scheduler,
which draws pictures of 32 x 32 pixels of one closed world. It is there so that a whole production line for adapters runs,
trains and is tested in minutes on two CPU cores. It is of no use for any other picture.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("lora_engine/bases/tiny/weights")
picture = pipeline(
    "a red star on the left on a striped blue background", num_inference_steps=12, guidance_scale=3.0
).images[0]
```

Beside the pipeline: `clip/`, a `CLIPModel` of the same world for metrics and captions (`heads.safetensors` are linear
classifiers on its embeddings); `judge.safetensors`, a classifier that reads the attributes off a picture.

## Data

Drawn by the program in `lora_engine/bases/tiny/world.py`; no photograph, no work of a person, no text from anywhere else.
Captions are made of the words of a picture, with parts left out and made-up words put in at random.

| attribute | words |
|---|---|
| shape | $shapes |
| colour | $colours |
| background | $backgrounds |
| texture of the background | $textures |
| position | $positions |

A $concept is drawn for the judge and for demonstrations, but the base, its text encoder and CLIP have never seen one.
$held_out of the combinations of shape, colour and background, a tenth, are in no training picture; all figures on held-out
captions are on those.

## Recipe

`python -m lora_engine.bases.tiny build` does all of it; every seed is fixed in the code.

| part | architecture | training |
|---|---|---|
| tokenizer | byte-level BPE; one to a few tokens for a word of the world, nearly one a letter for all others | none |
| autoencoder | 32 x 32 -> 8 x 8 x 16, widths 24, 48, 64 | $scenes scenes, $vae_steps steps of 2 x 12; L1 + 0.5 MSE + 0.5 L1 of gradients + KL; then $polish_steps steps of 2 x 12 for the decoder alone, on latents with a little noise |
| text encoder | two layers of 128, 32 tokens | $text_steps steps of 2 x 64 on naming attributes, then together with the U-Net |
| U-Net | widths 64, 128, attention on both levels | the same scenes, $diffusion_steps steps of 2 x 24; v-prediction, linear betas, EMA 0.998, 10 % empty captions |
| CLIP | two text layers and four vision layers of 128, patches of 8 | $clip_steps steps of 128, then three times $clip_more_steps on other scenes; contrastive, half of the batches of two pairs of colours only (in the last round alike in all but shape), plus heads that name attributes |
| judge | convolutions 24, 40, 64, 64 | $judge_scenes scenes, $judge_steps steps of 128, with blur and noise |

## Measured

$figures

## Limits

- Nothing but its own world: other words mean nothing to it, other subjects and sizes than 32 x 32 are not drawn.
- One object at a time, of one size; position is left, center or right.
- Guidance above 3.5 makes thin shapes thinner.
- Measures of quality on this world say nothing about quality on photographs.

## Licence

Apache-2.0, as the program that made it.
""")  # noqa: E501


def write_card(folder: Path, figures: Mapping[str, Any] | None) -> None:
    """Writes `README.md`, and `measured.json` where there are figures, into the folder of the base.

    Args:
        folder: Where the weights are.
        figures: As `measure` gives them; None for weights that were not measured yet.
    """
    settings = BuildSettings().model_dump()
    settings["judge_scenes"] = sum(settings["judge_scenes"])
    text = _CARD.substitute(
        settings,
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        backgrounds=f"{', '.join(BACKGROUNDS)}; never the object's colour",
        textures=", ".join(TEXTURES),
        positions=", ".join(POSITIONS),
        concept=CONCEPT,
        held_out=len(held_out_triples()),
        figures="These weights have not been measured yet." if figures is None else render_figures(figures),
    )
    if figures is not None:
        atomic_write(folder / FIGURES, json.dumps(figures, indent=2, sort_keys=True).encode() + b"\n")
    atomic_write(folder / "README.md", text.encode())


def read_figures(folder: Path) -> dict[str, Any]:
    """The figures of a measured base.

    Raises:
        BaseModelError: It was not measured, or the file is damaged.
    """
    try:
        figures: dict[str, Any] = json.loads((folder / FIGURES).read_bytes())
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"there are no figures of the base ({error})",
            where=str(folder / FIGURES),
            remedy="measure it: `python -m lora_engine.bases.tiny measure`",
        ) from None
    return figures


def render_figures(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table with its explanation."""
    judged, asked, clip = figures["judge"], figures["follows"], figures["clip"]
    names = ["shape", "colour", "background", "texture", "position", "all"]
    rows = [
        (f"judge on {judged['n']} drawings ({judged['concepts']} of them of the concept)", judged["right"]),
        (f"base on {asked['n']} held-out captions, read by the judge", asked["right"]),
        (f"CLIP on {clip['n']} held-out drawings, zero-shot", clip["right"]),
    ]
    lines = [f"| share that is right | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {what} | {' | '.join(_share(right.get(name)) for name in names)} |" for what, right in rows]
    vae = figures["autoencoder"]
    return "\n".join(
        [
            *lines,
            "",
            f"Captions name every attribute; guidance {asked['guidance']:g}, {asked['steps']} steps of DDIM.",
            "Zero-shot: the caption of the picture against the same caption with every other word of one attribute.",
            f"The autoencoder gives {vae['n']} drawings, the concept among them, back at {vae['psnr']:.1f} dB PSNR.",
        ]
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
