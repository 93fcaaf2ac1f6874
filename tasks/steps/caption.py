"""Defines the step `caption`: sets the caption of every image of a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from lora_engine.data.captioners import CAPTIONERS
from lora_engine.data.spec import CaptionSettings
from tasks.devices import gpu_slot
from tasks.operations.captions import (
    caption_cache,
    caption_labels,
    find_caption_models,
    log_findings,
    report_captions,
    with_located_models,
)
from tasks.resources import NO_RESOURCES
from tasks.spec import Input, StepSpec
from tasks.step import Context, step


class Caption(StepSpec, CaptionSettings):
    """The dataset, the source of captions, and the trigger word."""

    uses: Literal["caption"] = "caption"
    dataset: Annotated[str, Input("manifest")]

    def own_device(self) -> str:
        """Returns the device of the captioner."""
        return str(getattr(self.captioner, "device", "auto"))

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter the cache key; models enter it by their content, not by their names."""
        settings = super().key_settings()
        captioner = settings["captioner"]
        if isinstance(captioner, dict) and self.models():
            tagger = captioner.get("tagger")
            captioner = {name: value for name, value in captioner.items() if name != "model"}
            if isinstance(tagger, dict):
                captioner["tagger"] = {name: value for name, value in tagger.items() if name != "model"}
            settings["captioner"] = captioner
        if self.check is not None:
            settings["check"] = {}
        return settings


def find_imports(spec: Caption, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that the captioner imports."""
    del folder
    yield "lora_engine.data.caption"
    yield from CAPTIONERS[spec.captioner_name].imports
    if spec.check is not None:
        yield "lora_engine.captioning.checks"
        yield "lora_engine.embedding.embedder"


@step(
    Caption,
    produces="manifest",
    revision=2,
    summary="manifest.json",
    imports=find_imports,
    entries=lambda spec: [(CAPTIONERS, spec.captioner_name)],
    models=lambda spec, folder, _: find_caption_models(spec, folder),
    takes_device=True,
)
def caption(spec: Caption, context: Context) -> None:
    """Writes a manifest of the same images with all captions set, and `captions.json` if the captions are checked."""
    from lora_engine.data.caption import caption as describe

    settings = with_located_models(spec.narrow(CaptionSettings), context.folder_of_spec)
    models = find_caption_models(settings, Path())
    with ExitStack() as stack:
        if settings.models() or context.resources != NO_RESOURCES:
            device = spec.own_device() if settings.models() else "cpu"
            stack.enter_context(gpu_slot(context.home, device, context.concurrency, context.name, context.resources))
        manifest = describe(
            context.folder("dataset"),
            context.out,
            settings,
            progress=context.progress,
            cache=caption_cache(context.home),
            labels=caption_labels(settings, models),
        )
    if settings.is_reported:
        log_findings(report_captions(context.out, manifest, settings, models))
