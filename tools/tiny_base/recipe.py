"""Builds the embedded base: runs every training in its own processes, then assembles and measures the base.

Trainings whose results are in the work folder are skipped, so an interrupted build resumes.
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

from lora_engine.errors import SettingsError, TrainingError
from lora_engine.files import atomic_write, canonical_json
from tools.tiny_base.assembly import assemble
from tools.tiny_base.card import write_card
from tools.tiny_base.diffusion import FINISHED
from tools.tiny_base.measure import measure
from tools.tiny_base.peers import MEETING, PROCESSES, RANK
from tools.tiny_base.stage import BuildSettings

__all__ = ["STAGES", "Stage", "assemble", "build", "run_stage"]

SETTINGS = "settings.json"

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        module: Module of this package with `train(work, settings)`.
        result: The file or folder that it writes last into the work folder.
        processes: Number of processes.
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
    # The rows run in order; the lanes of a row run concurrently; the stages of a lane run in order.
    (("tokenizer",),),
    (("judge",), ("clip",)),
    (("autoencoder",),),
    (("diffusion",),),
)

_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_ENVIRONMENT = {
    # One thread per process: every core has its own process.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # By default glibc returns the memory of large tensors at every step, and page faults take a third of the time.
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    # Gloo must use the loopback interface; the host name may resolve to another one.
    **({"GLOO_SOCKET_IFNAME": _LOOPBACK[sys.platform]} if sys.platform in _LOOPBACK else {}),
}


def build(work: Path, out: Path, settings: BuildSettings | None = None, *, captions: int = 512) -> None:
    """Builds the base: trains all parts, assembles and measures them, writes the card.

    Args:
        work: Results of the trainings; kept, and reused by the next call.
        out: The finished folder; an older one is replaced.
        settings: Sizes and steps; None builds the shipped base.
        captions: Number of held-out captions for the measurement.

    Raises:
        SettingsError: The work folder has results of other settings.
        TrainingError: A training failed.
    """
    _claim(work, settings or BuildSettings())
    for lanes in _ORDER:
        _run_lanes(work, lanes)
    assemble(work, out)
    write_card(out, measure(out, captions=captions))


def run_stage(name: str, work: Path) -> None:
    """Runs one training in this process.

    Raises:
        SettingsError: There is no such training, or the work folder has no settings.
    """
    if name not in STAGES:
        raise SettingsError(f"unknown stage {name!r}", allowed=", ".join(STAGES))
    try:
        settings = BuildSettings.model_validate_json((work / SETTINGS).read_bytes())
    except (OSError, ValidationError) as error:
        raise SettingsError(f"the settings of the build cannot be read ({error})", where=str(work)) from None
    import_module(f"tools.tiny_base.{STAGES[name].module}").train(work, settings)


def _claim(work: Path, settings: BuildSettings) -> None:
    content = canonical_json(settings.model_dump(mode="json"))
    path = work / SETTINGS
    if path.exists() and path.read_bytes() != content:
        raise SettingsError(
            "the work folder has results of a build with other settings",
            where=str(path),
            remedy="use another work folder, or delete this one",
        )
    atomic_write(path, content)


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
        # With the rendezvous file of killed processes, the new ones would try to join those.
        (work / MEETING).unlink(missing_ok=True)
        command = [sys.executable, "-m", "tools.tiny_base", "stage", name, "--work", str(work.resolve())]
        self._processes = [
            subprocess.Popen(
                command, cwd=_ROOT, env={**os.environ, **_ENVIRONMENT, RANK: str(rank)}, stdin=subprocess.DEVNULL
            )
            for rank in range(STAGES[name].processes)
        ]

    def is_finished(self) -> bool:
        """Returns True if all processes succeeded; raises an error if one failed, since its peer would wait forever."""
        codes = [process.poll() for process in self._processes]
        failed = [code for code in codes if code]
        if failed:
            raise TrainingError(
                f"the training {self.name!r} failed with exit code {failed[0]}",
                remedy="see its output above, then run the same command to resume",
            )
        return all(code == 0 for code in codes)

    def stop(self) -> None:
        """Terminates the running processes and waits for them."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            process.wait()
