"""Defines the step `train`: trains an adapter on a captioned manifest.

Training runs in a child process, which can be stopped at any time and frees all of its memory at its end. Checkpoints
go to the work folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from lora_engine.bases.source import resolve_base
from lora_engine.catalog.kinds import KINDS
from lora_engine.compute import count_threads, fitting_trainings, measure_memory
from lora_engine.parallel import count_cores
from lora_engine.registries import Registry
from lora_engine.training.methods import methods
from lora_engine.training.spec import TrainSettings
from tasks.devices import device_slots
from tasks.spec import External, Input, StepSpec
from tasks.step import Context, always, step
from tasks.watching import watching


class Train(StepSpec, TrainSettings):
    """The base, the datasets and the training settings.

    Attributes:
        base: The base model.
        dataset: The user's images, captioned.
        class_dataset: Class images (regularization images) for `prior`; None means that the base generates them.
        embedder: Folder of the image model that `method.identity` uses; None means the embedded one.
    """

    uses: Literal["train"] = "train"
    base: str
    dataset: Annotated[str, Input("manifest")]
    class_dataset: Annotated[str | None, Input("manifest")] = None
    embedder: Annotated[str | None, External("folder")] = None


def find_entries(spec: Train) -> Iterator[tuple[Registry[Any], str]]:
    """Yields the method and the adapter kinds of a training."""
    yield methods, spec.method.name
    for kind in (spec.kind, *(override.kind for override in spec.overrides.values())):
        if kind is not None:
            yield KINDS, kind.name


@step(
    Train,
    produces="adapter",
    revision=2,
    # Since revision 3, samples are also drawn before the first step.
    revisions=lambda spec: 2 if spec.samples is None else 3,
    imports=always("lora_engine.training.device", "lora_engine.training.spawn", "registry.versions.live_run"),
    entries=find_entries,
    stops=True,
)
def train(spec: Train, context: Context) -> None:
    """Writes the adapter and `training.json`."""
    from lora_engine.training.spawn import train_in_child

    class_dataset = context.optional("class_dataset")
    job = {
        "settings": spec.narrow(TrainSettings).model_dump(mode="json"),
        "base": context.base(spec.base),
        "dataset": str(context.folder("dataset")),
        "out": str(context.out),
        "work": str(context.work),
        "cache": str(context.home.cache),
        "class_dataset": class_dataset and str(class_dataset),
        "embedder": str(context.files["embedder"]) if "embedder" in context.files else None,
    }
    with device_slots(context.home, device_limits(spec, context), context.name) as slots, watching(context) as watcher:
        context.compute.update(train_in_child(job, context.progress, watcher=watcher, stop=context.stop, inherit=slots))


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
    return {device: context.concurrency or fitting_trainings(device, **facts) for device in used_devices(spec.running)}
