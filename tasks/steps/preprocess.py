"""Defines the step `preprocess`: crops and resizes the images of a manifest for training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from lora_engine.data.preparation_spec import BackgroundMask, FaceCrop, FaceMask, TextMask
from lora_engine.data.spec import PreprocessSettings
from lora_engine.families import Family
from tasks.digests import PathDigest
from tasks.operations.preparation import describe_models, find_preparation_models, with_folders
from tasks.spec import Input, StepSpec
from tasks.step import Context, step


class Preprocess(StepSpec, PreprocessSettings):
    """The dataset, the resolution or sizes, and the crop."""

    uses: Literal["preprocess"] = "preprocess"
    dataset: Annotated[str, Input("manifest")]

    @classmethod
    def family_defaults(cls, families: Collection[Family]) -> dict[str, Any]:
        """Records the original sizes for bases that read them."""
        return {"original_sizes": True} if any(family.reads_framing for family in families) else {}

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter the cache key; models enter it by their content, not by their names."""
        settings = super().key_settings()
        for role in self.models():
            settings[role] = {name: value for name, value in settings[role].items() if name != "model"}
        return settings


def find_preprocess_revision(spec: Preprocess, _: Mapping[str, PathDigest]) -> int:
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
    revisions=find_preprocess_revision,
    summary="manifest.json",
    imports=find_imports,
    models=lambda spec, folder, _: describe_models(spec, folder),
)
def preprocess(spec: Preprocess, context: Context) -> None:
    """Writes a manifest whose images and masks have the requested sizes."""
    from lora_engine.data.preprocess import preprocess as preprocess_dataset

    settings = spec.narrow(PreprocessSettings)
    models = find_preparation_models(settings, context.folder_of_spec)
    preprocess_dataset(
        context.folder("dataset"),
        context.out,
        with_folders(settings, models),
        context.progress,
        labels={role: model.label for role, model in models.items()},
    )
