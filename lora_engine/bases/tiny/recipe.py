"""How the embedded base is made: the trainings in their order, each a process of its own, then the finished folder.

A training whose result is in the work folder is not run again, so that an interrupted build goes on where it was.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pydantic import ValidationError

from lora_engine.bases.tiny.assembly import assemble
from lora_engine.bases.tiny.card import write_card
from lora_engine.bases.tiny.diffusion import FINISHED
from lora_engine.bases.tiny.measure import measure
from lora_engine.bases.tiny.peers import MEETING, PROCESSES, RANK
from lora_engine.bases.tiny.stage import BuildSettings
from lora_engine.errors import SettingsError, TrainingError
from lora_engine.files import atomic_write, canonical_json

__all__ = ["STAGES", "Stage", "assemble", "build", "run_stage"]

SETTINGS = "settings.json"

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        module: Of this package; its `train(work, settings)` is run.
        result: The last thing that it writes into the work folder.
        processes: How many processes train together.
    """

    module: str
    result: str
    processes: int = 1


STAGES: Mapping[str, Stage] = {
    "tokenizer": Stage("tokenizer", "tokenizer"),
    "autoencoder": Stage("autoencoder", "vae.json", PROCESSES),
    "judge": Stage("judge", "judge.safetensors"),
    "clip": Stage("clip", "clip"),
    "diffusion": Stage("diffusion", FINISHED, PROCESSES),
}
_ORDER: Sequence[Sequence[Sequence[str]]] = (
    # One after another; of each, the lists at the same time; of each list, one after another.
    (("tokenizer",),),
    (("judge",), ("clip",)),
    (("autoencoder",),),
    (("diffusion",),),
)

_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_ENVIRONMENT = {
    # One thread each: every core has a process of its own.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # glibc otherwise gives the memory of large tensors back at every step, and page faults take a third of the time.
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    # Processes that train together talk over the loopback interface; what a machine is called may lead elsewhere.
    **({"GLOO_SOCKET_IFNAME": _LOOPBACK[sys.platform]} if sys.platform in _LOOPBACK else {}),
}


def build(work: Path, out: Path, settings: BuildSettings | None = None, *, captions: int = 512) -> None:
    """Makes the base from nothing: trains all parts, puts them together, measures them, writes the card.

    Args:
        work: Results of the single trainings; kept, so that the next call goes on from there.
        out: The finished folder; an older one is replaced.
        settings: Sizes and steps; the default makes the base that is shipped.
        captions: How many held-out captions the finished base is measured with.

    Raises:
        SettingsError: The work folder holds results of other settings.
        TrainingError: A training failed.
    """
    _claim(work, settings or BuildSettings())
    for lanes in _ORDER:
        _run_lanes(work, lanes)
    assemble(work, out)
    write_card(out, measure(out, captions=captions))


def run_stage(name: str, work: Path) -> None:
    """One training, in this process.

    Raises:
        SettingsError: There is no such training, or the work folder has no settings.
    """
    if name not in STAGES:
        raise SettingsError(f"there is no stage {name!r}", allowed=", ".join(STAGES))
    try:
        settings = BuildSettings.model_validate_json((work / SETTINGS).read_bytes())
    except (OSError, ValidationError) as error:
        raise SettingsError(f"the settings of the build cannot be read ({error})", where=str(work)) from None
    import_module(f"lora_engine.bases.tiny.{STAGES[name].module}").train(work, settings)


def _claim(work: Path, settings: BuildSettings) -> None:
    wanted = canonical_json(settings.model_dump(mode="json"))
    path = work / SETTINGS
    if path.exists() and path.read_bytes() != wanted:
        raise SettingsError(
            "the work folder holds results of a build with other settings",
            where=str(path),
            remedy="give another work folder, or remove this one",
        )
    atomic_write(path, wanted)


def _run_lanes(work: Path, lanes: Sequence[Sequence[str]]) -> None:
    waiting = [[name for name in lane if not (work / STAGES[name].result).exists()] for lane in lanes]
    running: dict[int, _Running] = {}
    try:
        while any(waiting) or running:
            for index, lane in enumerate(waiting):
                if index in running and running[index].is_finished():
                    del running[index]
                if index not in running and lane:
                    running[index] = _Running(work, lane.pop(0))
            time.sleep(_POLL_SECONDS)
    finally:
        for training in running.values():
            training.stop()


class _Running:
    """A training that runs in child processes."""

    def __init__(self, work: Path, name: str) -> None:
        _log.info("%s: training", name)
        self.name = name
        # Left behind by processes that were stopped, it would lead new ones to a meeting with those.
        (work / MEETING).unlink(missing_ok=True)
        command = [sys.executable, "-m", "lora_engine.bases.tiny", "stage", name, "--work", str(work)]
        self._processes = [
            subprocess.Popen(command, env={**os.environ, **_ENVIRONMENT, RANK: str(rank)}, stdin=subprocess.DEVNULL)
            for rank in range(STAGES[name].processes)
        ]

    def is_finished(self) -> bool:
        """Whether all its processes have ended well; one that failed is an error, since its peer would wait for it."""
        codes = [process.poll() for process in self._processes]
        failed = [code for code in codes if code]
        if failed:
            raise TrainingError(
                f"the training {self.name!r} ended with exit code {failed[0]}",
                remedy="see its last lines above; what is finished stays, and the same command goes on from there",
            )
        return all(code == 0 for code in codes)

    def stop(self) -> None:
        """Ends what still runs, and waits for it."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            process.wait()
