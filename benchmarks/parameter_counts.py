"""Prints parameters and file sizes of LoRA adapters for Stable Diffusion 1.5, by targets and rank.

    python -m benchmarks.parameter_counts [--rank 4 8 16 32 64]

Prints a Markdown table. Nothing is downloaded: the network and the text encoder are created without weights. Sizes do
not include the header, which adds some tens of kilobytes.
"""

from __future__ import annotations

import argparse
import math

import torch

from benchmarks.step_contenders import SHAPES
from lora_engine.adapters import DictTree
from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import module_shapes

TARGETS = {
    "attention": ("attention",),
    "attention+ff": ("attention+ff",),
    "all": ("all",),
    "text": ("text",),
    "attention, text": ("attention", "text"),
    "all, text": ("all", "text"),
}


def sd15_shapes() -> dict[str, tuple[int, ...]]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES["sd15"])
        # The settings of CLIP ViT-L/14's text encoder; the defaults are those of a smaller one.
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    return module_shapes(DictTree({"unet": unet, "text_encoder": text}))


def factor_parameters(shape: tuple[int, ...], rank: int) -> int:
    return rank * (shape[0] + math.prod(shape[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    ranks = parser.parse_args().rank
    shapes = sd15_shapes()
    print("| targets | modules | " + " | ".join(f"rank {rank}" for rank in ranks) + " |")
    print("|---" * (2 + len(ranks)) + "|")
    for label, targets in TARGETS.items():
        chosen = select_modules(shapes, list(targets))
        counts = [sum(factor_parameters(shapes[name], rank) for name in chosen) for rank in ranks]
        cells = [f"{count:,} ({4 * count / 1e6:.1f} / {2 * count / 1e6:.1f} MB)" for count in counts]
        print(f"| {label} | {len(chosen)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
