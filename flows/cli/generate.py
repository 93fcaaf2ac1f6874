"""Defines the verb `generate`, which imports the engine itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli.verbs import Access, add_verb
from lora_engine.inference import ComposedEngine

if TYPE_CHECKING:
    from lora_engine.inference.grid import Axis
    from tasks.operations.draw_request import DrawRequest


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verb to the command."""
    add_verb(app, Access.READ, generate)


def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help='Prompt, such as "a red zorb <lora:name@production:0.7>".')
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output folder for the images.")],
    base: Annotated[str, typer.Option(help="Base model: tiny, a hub id or a diffusers folder.")] = "tiny",
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of images.")] = 4,
    seed: Annotated[int, typer.Option(help="Random seed of the first image; the others count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 3.0,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    sampler: Annotated[
        str | None, typer.Option(help="Sampler, such as euler_a or 'DPM++ 2M Karras'. Default: the base's own.")
    ] = None,
    schedule_type: Annotated[
        str | None, typer.Option(help="Spacing of the steps, such as Karras or 'SGM Uniform'; needs --sampler.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT", help="Size in pixels, or one number for both. Default: that of --image or the base."
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Image to start from, instead of noise.")] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Mask of --image: its light parts are drawn, others are kept.")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="Share of the steps that run on --image, above 0 to 1; 1 keeps nothing of it.")
    ] = 0.75,
    enlarge: Annotated[
        float, typer.Option(metavar="FACTOR", help="Enlarge each image, up to 4 times, and draw it again.")
    ] = 1.0,
    enlarged_strength: Annotated[
        float, typer.Option(help="Share of the steps that run on the enlarged image, above 0 to 1.")
    ] = 0.5,
    clip_skip: Annotated[
        int | None,
        typer.Option(min=1, help="Layer of the CLIP text encoders from the last. Default: that of the training."),
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Another autoencoder: a folder or a hub id.")] = None,
    engine: Annotated[
        ComposedEngine,
        typer.Option(
            help="Merge adapters into the base's weights or attach them; auto merges into weights of 32 bits."
        ),
    ] = "auto",
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHERE=PROMPT",
            help="Prompt and adapters of a part of the image; repeatable. WHERE is LEFT,TOP,RIGHT,BOTTOM in shares of "
            "the image, or the file of a mask.",
        ),
    ] = None,
    feather: Annotated[
        float, typer.Option(metavar="PIXELS", help="Blur of the regions' borders, as a standard deviation.")
    ] = 0.0,
    only_regions: Annotated[
        bool, typer.Option("--only-regions", help="Draw only the regions of --image and keep its other pixels.")
    ] = False,
    adapter_guidance: Annotated[
        float, typer.Option(metavar="SCALE", help="Scale between the predictions without and with the adapters.")
    ] = 1.0,
    variation: Annotated[
        str | None, typer.Option(metavar="SEED:STRENGTH", help="Mix in the noise of another seed, 0 to 1.")
    ] = None,
    seed_size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Put the noise of this size into the middle.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of images that are drawn at once.")] = 8,
    tile_vae: Annotated[
        bool, typer.Option("--tile-vae", help="Decode one image at a time, in tiles, which needs less memory.")
    ] = False,
    offload: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Share of the denoiser's weights that stay out of the GPU's memory, 0 to 1."
        ),
    ] = 0.0,
    previews: Annotated[
        int, typer.Option(min=0, metavar="STEPS", help="Update DIR/preview.png every so many steps.")
    ] = 0,
    image_format: Annotated[
        Literal["png", "webp", "jpeg"], typer.Option("--format", help="Format of the images.")
    ] = "png",
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="Quality of JPEG and WebP; a WebP of 100 is lossless.")
    ] = 90,
    sign_c2pa: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="CERT KEY", help="Sign images with C2PA: certificate chain and private key, both PEM."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "-x",
            metavar="AXIS",
            help="Grid: seed, steps, guidance, sampler, strength, adapter, weight or a word of the prompt, =A,B,C.",
        ),
    ] = None,
    rows: Annotated[str | None, typer.Option("-y", metavar="NAME=A,B", help="Second axis of the grid.")] = None,
    sheets: Annotated[str | None, typer.Option("-z", metavar="NAME=A,B", help="Third axis: one sheet each.")] = None,
    animated: Annotated[bool, typer.Option("--gif", help="Write the first row of the grid as a GIF, too.")] = False,
) -> None:
    """Generate images with the adapters that the prompt names, or a grid of images."""
    from lora_engine.bases.samplers import join_schedule
    from lora_engine.errors import SettingsError
    from lora_engine.inference.grid import parse_axis
    from lora_engine.inference.variation import NoiseVariation
    from tasks.operations.draw_request import DrawRequest, parse_size

    request = DrawRequest(
        prompt,
        base,
        negative,
        count,
        seed,
        steps=steps,
        guidance=guidance,
        size=None if size is None else parse_size(size),
        sampler=join_schedule(sampler, schedule_type),
        clip_skip=clip_skip,
        vae=vae,
        image=image,
        mask=mask,
        strength=strength,
        enlarge=enlarge,
        enlarged_strength=enlarged_strength,
        engine=engine,
        regions=tuple(region or ()),
        feather=feather,
        only_regions=only_regions,
        adapter_guidance=adapter_guidance,
        variation=None if variation is None else NoiseVariation.parse(variation),
        seed_size=None if seed_size is None else parse_size(seed_size),
        batch=batch,
        tile_vae=tile_vae,
        offload=offload,
        previews=previews,
        format=image_format,
        quality=quality,
        credentials=sign_c2pa,
    )
    axes = [parse_axis(text) for text in (columns, rows, sheets) if text is not None]
    if (columns is None and (rows is not None or animated)) or (rows is None and sheets is not None):
        raise SettingsError("a grid needs its first axes", remedy="set -x, and -y for -z")
    _draw(request, axes, output, animated=animated)


def _draw(request: DrawRequest, axes: Sequence[Axis], output: Path, *, animated: bool) -> None:
    """Draws images, or a grid along the axes, with its progress; prints notes and the files."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.stopping import stoppable
    from flows.cli.verbs import home_path
    from tasks.operations.image_grids import draw_grid
    from tasks.operations.images import draw
    from tasks.progress import StepEvent, publish

    notes: list[str] = []
    with stoppable(), show_run(["generate"], Console()):
        publish(StepEvent("generate", "started"))
        if axes:
            images = draw_grid(request, axes, output, home_path(), animated=animated, note=notes.append)
        else:
            images = draw(request, output, home_path(), notes.append)
        publish(StepEvent("generate", "completed"))
    for line in (*notes, *images):
        print(line)
