"""The routes of A1111's API that list: models, adapters, samplers, options, and what Loraline does not have."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from flows.web.a1111_answers import INVALID, A1111Route
from flows.web.image_requests import service_of
from lora_engine.bases.samplers import SAMPLERS, SCHEDULE_TYPES
from lora_engine.errors import SettingsError
from tasks.serving.catalog import describe_base, list_named_adapters

list_routes = APIRouter(prefix="/sdapi/v1", route_class=A1111Route, responses=INVALID, tags=["A1111"])
ping_routes = APIRouter(prefix="/internal", route_class=A1111Route, tags=["A1111"])
_FIXED: dict[str, Any] = {
    "sd_vae": "Automatic",
    "CLIP_stop_at_last_layers": 1,
    "samples_format": "png",
    "enable_pnginfo": True,
    "show_progress_every_n_steps": 1,
    "sd_lora": "None",
    "sd_hypernetwork": "None",
}
"""Options that a client may read and post back; other values are refused, because they would change other clients."""


class NamedSampler(BaseModel):
    """A sampler."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class NamedSchedule(BaseModel):
    """A schedule type."""

    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = Field(default=-1.0, ge=-1, le=100)
    need_inner_model: bool = False


class ModelEntry(BaseModel):
    """A base model."""

    model_config = ConfigDict(protected_namespaces=())

    title: str
    model_name: str
    hash: str
    sha256: str
    filename: str
    config: str | None = None


class AdapterEntry(BaseModel):
    """A registered adapter; `path` is its reference, not a file."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


class UpscalerEntry(BaseModel):
    """A way to enlarge images."""

    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float = Field(default=4.0, ge=1, le=4)


@list_routes.get("/options")
def show_options(request: Request) -> dict[str, Any]:
    """Returns the options; only the model is one that clients set."""
    base = describe_base(service_of(request).settings.base)
    return {"sd_model_checkpoint": base.title, "sd_checkpoint_hash": base.fingerprint, **_FIXED}


@list_routes.post("/options")
def set_options(options: dict[str, Any], request: Request) -> None:
    """Accepts options as they are: a server has one base, and a client does not change the images of others."""
    base = describe_base(service_of(request).settings.base)
    wanted = options.get("sd_model_checkpoint")
    if wanted is not None and not base.is_named(str(wanted)):
        raise SettingsError(f"sd_model_checkpoint is {str(wanted)[:80]!r}", allowed=base.title)
    for name, value in _FIXED.items():
        if name in options and options[name] is not None and options[name] != value:
            raise SettingsError(
                f"{name} is {str(options[name])[:60]!r}",
                allowed=repr(value),
                remedy="send it in override_settings of a request",
            )


@list_routes.get("/sd-models")
def list_models(request: Request) -> list[ModelEntry]:
    """Returns the base of the server."""
    base = describe_base(service_of(request).settings.base)
    return [
        ModelEntry(
            title=base.title,
            model_name=base.name,
            hash=base.fingerprint[:10],
            sha256=base.fingerprint,
            filename=base.name,
        )
    ]


@list_routes.get("/loras")
def list_loras(request: Request) -> list[AdapterEntry]:
    """Returns the active versions that have an alias; `<lora:NAME:1>` with a name or alias of the list attaches one."""
    return [
        AdapterEntry(
            name=adapter.name,
            alias=adapter.label,
            path=adapter.reference,
            metadata={"sha256": adapter.sha256, **adapter.card},
        )
        for adapter in list_named_adapters(service_of(request).home)
    ]


@list_routes.get("/samplers")
def list_samplers() -> list[NamedSampler]:
    """Returns the samplers."""
    return [NamedSampler(name=each.title, aliases=[name], options={}) for name, each in SAMPLERS.items()]


@list_routes.get("/schedulers")
def list_schedulers() -> list[NamedSchedule]:
    """Returns the schedule types."""
    return [NamedSchedule(name=name, label=_label(name)) for name in SCHEDULE_TYPES]


@list_routes.get("/upscalers")
def list_upscalers() -> list[UpscalerEntry]:
    """Returns the way in which `enable_hr` enlarges."""
    return [UpscalerEntry(name="Lanczos")]


@list_routes.get("/cmd-flags")
def show_flags() -> dict[str, bool]:
    """Returns the flags that clients look for."""
    return {"api": True, "nowebui": True}


@list_routes.get("/scripts")
def list_scripts() -> dict[str, list[str]]:
    """Returns no scripts."""
    return {"txt2img": [], "img2img": []}


@list_routes.get("/embeddings")
def list_embeddings() -> dict[str, dict[str, Any]]:
    """Returns no embeddings: learned words are part of registered adapters."""
    return {"loaded": {}, "skipped": {}}


@list_routes.get("/memory")
def show_memory() -> dict[str, dict[str, Any]]:
    """Returns the memory of the machine in bytes; that of a GPU is a metric of the server."""
    import psutil

    memory = psutil.virtual_memory()
    used = psutil.Process().memory_info().rss
    return {
        "ram": {"free": memory.available, "used": used, "total": memory.total},
        "cuda": {"error": "unavailable"},
    }


@ping_routes.get("/ping", include_in_schema=False)
def answer_ping() -> dict[str, str]:
    """Returns an empty object."""
    return {}


def list_nothing() -> list[str]:
    """Returns an empty list: Loraline has nothing of that kind."""
    return []


def refresh_nothing() -> None:
    """Does nothing: the lists are read from the registry at each request."""


for _name in (
    *("latent-upscale-modes", "sd-vae", "sd-modules", "hypernetworks", "face-restorers"),
    *("realesrgan-models", "prompt-styles", "script-info"),
):
    list_routes.add_api_route(f"/{_name}", list_nothing, methods=["GET"], name=_name)
for _name in ("refresh-loras", "refresh-checkpoints", "refresh-vae"):
    list_routes.add_api_route(f"/{_name}", refresh_nothing, methods=["POST"], name=_name)


def _label(name: str) -> str:
    return {"sgm_uniform": "SGM Uniform", "ddim": "DDIM"}.get(name, name.capitalize())
