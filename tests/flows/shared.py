"""Provides expensive fixtures that tests share: a trained home, a Prefect database, one server per worker."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import urlopen

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from flows.prefect import configure_prefect
from flows.server import prefect_server as running_server
from lora_engine.compute import describe_compute, threads
from lora_engine.progress import Point, Progress, Unwatched
from lora_engine.training.spawn import train_in_child
from registry.entities import AdapterVersion
from registry.home import Home
from registry.versions.versions import Versions

LINE = """\
name: small
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/, heldout: 0.5}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: zorb, class_word: ring}
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 12, batch: 4, checkpoint_every: 3}
  report:
    uses: evaluate
    adapter: adapter
    dataset: captions
    prompts: prompts.txt
    seeds: 1
    steps: 1
    max_pictures: 2
    gates: {validation_loss: {max: 10.0}}
  release:  {uses: register, adapter: adapter, report: report, alias: staging}
  exports:  {uses: convert, adapter: adapter, to: [kohya, diffusers, peft]}
"""
DATABASE = "prefect.db"


def draw_noise(path: Path, seed: int) -> None:
    """Writes a 48 x 64 image of color noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_line(folder: Path, text: str = LINE) -> Path:
    """Writes a pipeline file, with eight images and the prompts beside it, and returns its path."""
    (folder / "images").mkdir()
    for index in range(8):
        draw_noise(folder / "images" / f"{index}.png", index)
    (folder / "prompts.txt").write_text("a red zorb\n")
    path = folder / "line.yaml"
    path.write_text(text)
    return path


@dataclass(frozen=True)
class Trained:
    """A home in which every step of a small pipeline is cached.

    Args:
        home: The home with `small@1`, which has the alias `staging`.
        spec: The pipeline file, beside its images and prompts.
    """

    home: Home
    spec: Path

    def version(self, ref: str | int = 1) -> AdapterVersion:
        """Reads a version of `small`."""
        with closing(Versions(self.home)) as versions:
            return versions.show("small", ref)


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """Returns the folder that all workers of a test run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def fill_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """Returns a folder that one worker fills while the others wait, and that all read."""
    root = run_folder(factory)
    folder, partial = root / name, root / f"{name}.partial"
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            fill(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yields the address of the Prefect server of all workers; the worker that needs it first starts it."""
    home = Home.open(tmp_path_factory.mktemp("server"))
    configure_prefect(home)
    users = run_folder(tmp_path_factory) / "prefect-users"
    users.mkdir(exist_ok=True)
    user = users / str(os.getpid())
    user.touch()

    from prefect.settings import PREFECT_API_URL, temporary_settings

    with ExitStack() as started:

        def start(folder: Path) -> None:
            address = started.enter_context(running_server())
            wait_until_up(address)
            # A server with a copy skips the migrations, which take longer than the rest of the start.
            database = home.prefect / DATABASE
            with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(folder / DATABASE)) as target:
                source.backup(target)
            (folder / "address").write_text(address)

        address = (fill_once(tmp_path_factory, "prefect", start) / "address").read_text()
        with temporary_settings({PREFECT_API_URL: address}):
            yield address
        user.unlink(missing_ok=True)
        # The server ends with the process that started it.
        while any(is_running(int(other.name)) for other in users.iterdir()):
            time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Returns False also for a process that ended and waits for its parent."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="session")
def prefect_database(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a migrated database without flow runs; a server with a copy of it skips the migrations."""
    return run_folder(tmp_path_factory) / "prefect" / DATABASE


def wait_until_up(address: str) -> None:
    """Waits until the server answers, after its migrations."""
    deadline = time.monotonic() + 600
    while True:
        try:
            with urlopen(f"{address}/health", timeout=60) as answer:
                assert answer.read() == b"true"
                return
        except OSError:  # refused, reset, or not answered in time
            assert time.monotonic() < deadline, f"no server answers at {address}"
            time.sleep(0.1)


@contextmanager
def training_here() -> Iterator[None]:
    """Makes trainings run in this process, because importing torch in a child takes longer than a few steps."""
    from lora_engine.training.device import choose_device
    from lora_engine.training.run import train
    from lora_engine.training.spec import TrainSettings

    training_lock = threading.Lock()  # training changes global state of torch

    def train_here(job: Mapping[str, Any], progress: Progress, **options: Any) -> dict[str, Any]:
        settings = TrainSettings.model_validate(job["settings"])
        if settings.running.processes > 1:
            return train_in_child(job, progress, **options)
        paths = ("cache", "class_dataset", "embedder", "init", "state")
        optional = {name: Path(job[name]) if job[name] else None for name in paths}
        optional |= {name: job[name] for name in ("vae", "origin", "fresh")}
        dataset, out, work = (Path(job[name]) for name in ("dataset", "out", "work"))
        stop, watcher = options.get("stop") or (lambda: False), options.get("watcher") or Unwatched()

        def report(done: int, total: int, values: Mapping[str, float]) -> None:
            if done or "validation_loss" in values:
                watcher.on_points([Point(done, time.time(), values)])
            progress(done, total, values)

        watched: Any = {**optional, "progress": report, "on_samples": watcher.on_samples, "stop": stop}
        with training_lock, threads(1):
            train(settings, job["base"], dataset, out, work, **watched)
            return describe_compute(choose_device(settings.running))

    with patch("lora_engine.training.spawn.train_in_child", train_here):
        yield


@pytest.fixture
def trained_here() -> Iterator[None]:
    """Makes trainings run in the test's process; not for tests of the child process."""
    with training_here():
        yield


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a pipeline, its images and its home; created once per test run, read-only."""

    from tests.flows.made import run_line

    def train(folder: Path) -> None:
        with training_here():
            run_line(write_line(folder), Home.open(folder / "home"))

    return fill_once(tmp_path_factory, "trained", train)


@pytest.fixture
def trained(trained_home: Path, tmp_path: Path) -> Trained:
    """Returns a copy of the trained home for one test."""
    return copy_trained(trained_home, tmp_path / "trained")


def copy_trained(trained_home: Path, folder: Path) -> Trained:
    """Copies the trained home, its pipeline file and its images."""
    shutil.copytree(trained_home, folder)
    copy = Trained(Home.open(folder / "home"), folder / "line.yaml")
    # MLflow stores absolute URIs of artifacts. Opening a moved home rewrites them.
    Versions(copy.home).close()
    return copy
