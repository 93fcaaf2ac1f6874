"""Defines the step `preprocess`: crops and resizes the images of a manifest for training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from lora_engine.data.preparation_spec import BackgroundMask, FaceCrop, FaceMask, TextMask, is_model_folder
from lora_engine.data.spec import PreprocessSettings
from tasks.digests import PathDigest
from tasks.spec import Input, StepSpec
from tasks.step import Context, step


class Preprocess(StepSpec, PreprocessSettings):
    """The dataset, the resolution or sizes, and the crop."""

    uses: Literal["preprocess"] = "preprocess"
    dataset: Annotated[str, Input("manifest")]

    def externals(self) -> Iterator[tuple[str, str, Literal["file", "folder"]]]:
        """Yields the folders of models too: their content enters the cache key. A hub id is only a setting."""
        yield from super().externals()
        for setting in ("mask", "upscale"):
            model = getattr(getattr(self, setting), "model", None)
            if model is not None and is_model_folder(model):
                yield _role(setting), model, "folder"


def find_revision(spec: Preprocess, _: Mapping[str, PathDigest]) -> int:
    """Returns 2 for buckets; since revision 3, squares have a largest factor of enlargement."""
    return 2 if spec.crop == "bucket" else 3


def find_imports(spec: Preprocess, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that crop, mask and enlarge."""
    del folder
    yield "lora_engine.data.preprocess"
    if isinstance(spec.crop, FaceCrop) or isinstance(spec.mask, FaceMask):
        yield "lora_engine.data.blazeface"
    if isinstance(spec.mask, TextMask | BackgroundMask):
        yield "lora_engine.data.segmentation"
    if not isinstance(spec.upscale, str):
        yield "lora_engine.data.upscaling"


@step(
    Preprocess,
    produces="manifest",
    revision=3,
    revisions=find_revision,
    summary="manifest.json",
    imports=find_imports,
)
def preprocess(spec: Preprocess, context: Context) -> None:
    """Writes a manifest whose images and masks have the requested sizes."""
    from lora_engine.data.preprocess import preprocess as preprocess_dataset

    settings = spec.narrow(PreprocessSettings)
    for setting in ("mask", "upscale"):
        if (folder := context.files.get(_role(setting))) is not None:
            located = getattr(settings, setting).model_copy(update={"model": str(folder)})
            settings = settings.model_copy(update={setting: located})
    preprocess_dataset(context.folder("dataset"), context.out, settings, context.progress)


def _role(setting: str) -> str:
    return f"{setting}.model"
