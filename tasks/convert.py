"""`convert`: an adapter, written in the formats that other programs read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_engine.files import atomic_write, canonical_json
from tasks.spec import StepSpec, Takes
from tasks.step import Context, step

Format = Literal["loraline", "kohya", "diffusers", "peft", "comfyui"]


class Convert(StepSpec):
    """Which adapter, and to which formats."""

    uses: Literal["convert"] = "convert"
    adapter: Annotated[str, Takes("adapter")]
    to: Annotated[tuple[Format, ...], Field(min_length=1)]


@step(Convert, gives="export", revision=1)
def convert(spec: Convert, context: Context) -> None:
    """Writes one folder a format, and `exports.json` which lists the files of each."""
    from lora_engine.formats import read_adapter, write_adapter

    adapter, card = read_adapter(context.folder("adapter") / "adapter.safetensors")
    exports = {}
    for name in spec.to:
        written = write_adapter(context.out / name, adapter, format=name, card=card)
        exports[name] = sorted(path.relative_to(context.out).as_posix() for path in written)
    atomic_write(context.out / "exports.json", canonical_json(exports))
