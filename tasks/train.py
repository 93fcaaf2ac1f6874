"""`train`: a captioned manifest and a base become an adapter.

Training runs in a child process: it can be stopped at any time, keeps its checkpoints in the work folder, and gives all
of its memory back.
"""

from __future__ import annotations

from typing import Annotated, Literal

from lora_engine.training.spec import TrainSettings
from tasks.progress import stop_requested
from tasks.spec import StepSpec, Takes
from tasks.step import Context, step


class Train(StepSpec, TrainSettings):
    """What to train, on what, and how."""

    uses: Literal["train"] = "train"
    base: str
    dataset: Annotated[str, Takes("manifest")]


@step(Train, gives="adapter", revision=1)
def train(spec: Train, context: Context) -> None:
    """Writes the adapter and the record of its training."""
    from lora_engine.training.spawn import train_in_child

    job = {
        "settings": spec.narrow(TrainSettings).model_dump(mode="json"),
        "base": context.base(spec.base),
        "dataset": str(context.folder("dataset")),
        "out": str(context.out),
        "work": str(context.work),
    }
    train_in_child(job, context.progress, stop=stop_requested)
