"""Defines the step `train`: trains an adapter on a captioned manifest.

Training runs in a child process, which can be stopped at any time and frees all of its memory at its end. Checkpoints
go to the work folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from lora_engine.bases.source import resolve_base
from lora_engine.catalog.kinds import KINDS
from lora_engine.compute import count_threads, fitting_trainings, measure_memory
from lora_engine.parallel import count_cores
from lora_engine.registries import Registry
from lora_engine.training.methods import methods
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.running import Running
from registry.home import Home
from tasks.devices import device_slots, gpu_name
from tasks.digests import PathDigest
from tasks.resources import device_type, gpu_number
from tasks.spec import External, Input, StepSpec
from tasks.step import Context, always, step
from tasks.watching import watching

RATES_OR_INPUTS = "its inputs or the rates of its steps changed; `then` adds steps at other rates"


class Train(StepSpec, TrainSettings):
    """The base, the datasets and the training settings.

    Attributes:
        base: The base model.
        dataset: The user's images, captioned.
        class_dataset: Class images (regularization images) for `prior`; None means that the base generates them.
        embedder: Folder of the image model that `method.identity` uses; None means the embedded one.
        vae: Another autoencoder for the base: a folder in diffusers' layout, or a hub id; None is the base's own.
        init: The adapter to start from: a step, `name@version`, `name@alias` or a file; None starts with no difference.
    """

    uses: Literal["train"] = "train"
    base: str
    vae: str | None = None
    dataset: Annotated[str, Input("manifest")]
    class_dataset: Annotated[str | None, Input("manifest")] = None
    embedder: Annotated[str | None, External("folder")] = None
    init: Annotated[str | None, Input("adapter", or_file=True)] = None

    def own_device(self) -> str:
        """Returns the device of `running`."""
        return self.running.device

    def running_here(self) -> Running:
        """Returns `running` with the device of `resources`, if that names one."""
        asked = device_type(self.resources.device) if self.resources else "auto"
        return self.running if asked == "auto" else self.running.model_copy(update={"device": asked})

    @model_validator(mode="after")
    def _a_numbered_gpu_holds_one_process(self) -> Train:
        if self.resources and gpu_number(self.resources.device) is not None and self.running.processes > 1:
            raise ValueError(
                f"resources.device is {self.resources.device!r}, but running.processes is {self.running.processes}; "
                "write cuda without a number, and choose the GPUs with CUDA_VISIBLE_DEVICES"
            )
        return self

    @model_validator(mode="after")
    def _has_an_optimizer_state(self) -> Train:
        if self.optimizer_state and self.init is None:
            raise ValueError("optimizer_state is that of the training of init; set init, or leave it out")
        return self

    @model_validator(mode="after")
    def _automatic_rank_starts_from_zero(self) -> Train:
        if self.init is not None and self.is_auto("rank"):
            raise ValueError("rank auto cannot start from an adapter; set a rank, or leave init out")
        return self


def find_train_revision(spec: Train, files: Mapping[str, PathDigest]) -> int:
    """Returns the first revision that trains a spec as this release does; see `StepKind.revisions`.

    From 3 on, a training with an automatic rank scores candidates at their best prefix of the ranks.
    """
    from lora_engine.training.automatic import scores_prefixes

    return 3 if scores_prefixes(spec, spec.automatic) else 2


def find_entries(spec: Train) -> Iterator[tuple[Registry[Any], str]]:
    """Yields the method and the adapter kinds of a training."""
    yield methods, spec.method.name
    for kind in (spec.kind, *(override.kind for override in spec.overrides.values())):
        if kind is not None:
            yield KINDS, kind.name


def state_folder(home: Home, key: str) -> Path:
    """Returns the folder with the state of the training of a cache key."""
    return home.cache / "states" / key


def describe_progress(spec: Train, origin: str, home: Home, last_key: str | None) -> str:
    """Returns which steps of earlier trainings a run would continue, or lose and why; empty for neither.

    Args:
        spec: The step.
        origin: Digest of everything else that it depends on.
        home: The home with the states.
        last_key: Cache key of the last execution of the step in its pipeline.
    """
    from lora_engine.training.continuing import find_loss, find_state

    states, settings = home.cache / "states", spec.narrow(TrainSettings)
    folders = [folder / "checkpoints" for folder in sorted(states.iterdir())] if states.is_dir() else []
    state = find_state(settings, origin, folders)
    if state is not None:
        return f"continues from step {state.step}"
    loss = find_loss(settings, origin, state_folder(home, last_key) / "checkpoints") if last_key else None
    if loss is None:
        return ""
    file, changes = loss
    reasons = "; ".join(f"{name}: {change.reason}" for name, change in changes.items())
    return f"begins at step 0, not at step {file.step} of the last run ({reasons or RATES_OR_INPUTS})"


def _describe_cost(spec: Train) -> str:
    from lora_engine.training.automatic import describe_cost

    return describe_cost(spec)


@step(
    Train,
    produces="adapter",
    revision=3,
    revisions=find_train_revision,
    imports=always("lora_engine.training.device", "lora_engine.training.spawn", "registry.versions.live_run"),
    entries=find_entries,
    stops=True,
    takes_device=True,
    describe_progress=describe_progress,
    describe_cost=_describe_cost,
)
def train(spec: Train, context: Context) -> None:
    """Writes the adapter and `training.json`."""
    from lora_engine.training.spawn import train_in_child

    class_dataset, parent = context.optional("class_dataset"), context.optional("init")
    init = parent / "adapter.safetensors" if parent else context.files.get("init")
    settings = spec.narrow(TrainSettings).model_copy(update={"running": spec.running_here()})
    job = {
        "settings": settings.model_dump(mode="json"),
        "base": context.base(spec.base),
        "dataset": str(context.folder("dataset")),
        "out": str(context.out),
        "work": str(context.work),
        "cache": str(context.home.cache),
        "class_dataset": class_dataset and str(class_dataset),
        "embedder": str(context.files["embedder"]) if "embedder" in context.files else None,
        "init": init and str(init),
        "vae": context.base(spec.vae) if spec.vae else None,
        "state": str(state_folder(context.home, context.key)),
        "origin": context.origin,
        "fresh": context.force,
    }
    number = gpu_number(context.resources.device)
    variables = {} if number is None else {"CUDA_VISIBLE_DEVICES": gpu_name(number)}
    slots = device_slots(context.home, device_limits(spec, context), context.name, context.resources)
    with slots as descriptors, watching(context) as watcher:
        compute = train_in_child(
            job, context.progress, watcher=watcher, stop=context.stop, inherit=descriptors, variables=variables
        )
        context.compute.update(compute)


def device_limits(spec: Train, context: Context) -> dict[str, int]:
    """Returns, per device of this training, the maximum trainings: the run's `concurrency`, or what the device fits."""
    from lora_engine.training.device import used_devices

    facts = {
        "cores": count_cores(),
        "memory": measure_memory(),
        "threads": count_threads(),
        "processes": spec.running.processes,
        "base": resolve_base(context.base(spec.base)).size,
    }
    number, running = gpu_number(context.resources.device), spec.running_here()
    devices = used_devices(running) if number is None else (f"cuda-{gpu_name(number)}",)
    return {device: context.concurrency or fitting_trainings(device, **facts) for device in devices}
