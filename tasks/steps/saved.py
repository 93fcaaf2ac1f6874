"""Defines the step `saved`: an adapter that a training saved on the way, as an adapter of its own."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field

from lora_engine.errors import DataError
from lora_engine.files import atomic_write, canonical_json
from tasks.spec import Input, StepSpec
from tasks.step import Context, step

_CURVES = "training.json"


class Saved(StepSpec):
    """The training and the step of the saved adapter.

    A reference `adapter@step-200` in another step is short for such a step.

    Attributes:
        adapter: The step that trained with `save_every`.
        at: Training step after which the adapter was saved.
    """

    uses: Literal["saved"] = "saved"
    adapter: Annotated[str, Input("adapter")]
    at: int = Field(ge=1, le=10_000_000)


@step(Saved, produces="adapter", revision=1)
def saved(spec: Saved, context: Context) -> None:
    """Writes the adapter, and the curves of the training up to its step."""
    folder = context.folder("adapter")
    curves = json.loads((folder / _CURVES).read_bytes()) if (folder / _CURVES).is_file() else {}
    files = {int(entry["step"]): str(entry["file"]) for entry in curves.get("saved", ())}
    if spec.at not in files:
        raise DataError(
            f"no adapter of {spec.adapter!r} was saved at step {spec.at}",
            where=f"step {context.name!r}",
            allowed=", ".join(map(str, files)) or "none",
            remedy="choose one of them"
            if files
            else f"set save_every in {spec.adapter!r}, and run it again with --force {spec.adapter} if it is cached",
        )
    atomic_write(context.out / "adapter.safetensors", (folder / files[spec.at]).read_bytes())
    before = {
        name: [point for point in curves[name] if point[0] <= spec.at]
        for name in ("loss", "lr", "validation_loss")
        if name in curves
    }
    atomic_write(context.out / _CURVES, canonical_json({**before, "trained_on": curves.get("trained_on", [])}))
