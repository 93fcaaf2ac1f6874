"""The engines of serving by name, each with its options. Torch-free: an engine is imported when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from lora_engine.errors import SettingsError
from lora_engine.registries import Registry, import_target

if TYPE_CHECKING:
    from lora_engine.serving.engine import ImageEngine


_Side = Annotated[int, Field(ge=8, le=16384)]
_Images = Annotated[int, Field(ge=1, le=64)]


class EngineOptions(BaseModel):
    """The options of all engines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_images: int = Field(default=8, ge=1, le=64, description="Images that are drawn in one batch.")


class StaticOptions(EngineOptions):
    """The static engine: adapters that are fused at the start."""

    adapters: str = Field(
        default="", description="The adapters as a prompt names them, such as <lora:zorb@production:0.7>."
    )


class DynamicOptions(EngineOptions):
    """The dynamic engine: adapters by request."""

    cache_bytes: int = Field(default=1 << 30, ge=0, le=1 << 44, description="Bytes of adapters that stay in memory.")


class CompiledOptions(DynamicOptions):
    """The compiled engine: adapters by request, in a network that is compiled once for each size."""

    max_images: int = Field(default=4, ge=1, le=64, description="Images of the largest compiled batch.")
    batches: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        default=(1,), description="Other compiled batches, in images."
    )
    rank: int = Field(default=16, ge=1, le=1024, description="Largest rank of all adapters of an image together.")
    targets: str = Field(default="attention", description="Layers with products; see `select_modules`.")
    sizes: tuple[tuple[_Side, _Side], ...] = Field(
        default=(), description="(height, width) of compiled images in pixels; empty is the base's default."
    )
    backend: str = Field(default="inductor", description="Backend of torch.compile.")


@dataclass(frozen=True)
class ServingEngine:
    """An engine of serving, one entry of `ENGINES`.

    Attributes:
        name: Name on the command line.
        title: What it is for, in a few words.
        target: `module:class`; called with the base, the options and the files of the adapters in the options.
        options: Class of its options.
    """

    name: str
    title: str
    target: str
    options: type[EngineOptions]


ENGINES: Registry[ServingEngine] = Registry("engine", entry=ServingEngine, source="lora_engine.serving.engines")

STATIC = ServingEngine(
    "static",
    "adapters fused once at the start; costs what the base costs",
    "lora_engine.serving.static:StaticEngine",
    StaticOptions,
)
DYNAMIC = ServingEngine(
    "dynamic",
    "adapters by request, different ones in one batch",
    "lora_engine.serving.dynamic:DynamicEngine",
    DynamicOptions,
)
COMPILED = ServingEngine(
    "compiled",
    "adapters by request in a compiled network, which a switch does not compile again",
    "lora_engine.serving.compiled:CompiledEngine",
    CompiledOptions,
)


def make_engine(
    name: str, base: str, options: EngineOptions | None = None, *, files: Sequence[tuple[Path, str]] = ()
) -> ImageEngine:
    """Creates an engine.

    Args:
        name: A name among `ENGINES`.
        base: The base; see `load_base`.
        options: Its options; None are the defaults.
        files: File and `name@version` of the adapters in the options, in their order; for `static` alone.

    Raises:
        SettingsError: No such engine, the options are those of another one, or it takes no files.
        EngineError: The base or an adapter cannot be used.
    """
    entry = ENGINES[name]
    chosen = entry.options() if options is None else options
    if type(chosen) is not entry.options:
        raise SettingsError(
            f"the engine {name!r} was given options of type {type(chosen).__name__!r}",
            allowed=entry.options.__name__,
            remedy="pass its own options",
        )
    if files and entry.options is not StaticOptions:
        raise SettingsError(
            f"the engine {name!r} takes adapters by request, not at its start",
            allowed="adapters at the start with the engine 'static'",
            remedy="leave them out",
        )
    make = import_target(ENGINES, name, entry.target)
    engine: ImageEngine = make(base, chosen, files) if files else make(base, chosen)
    return engine
