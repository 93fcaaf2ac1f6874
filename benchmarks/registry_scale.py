"""Builds a home with many versions, and measures the commands that read and write it.

    python -m benchmarks.registry_scale [--versions 1000] [--names 50] [--home FOLDER] [--rounds 3]

Every version goes through the registry's own functions: a run with a training and an evaluation of one dataset in
lineage, a small valid adapter, a report, gates, documents and an alias; every fourth names the version before as its
parent. MLflow is synced once, at the end. `--home` keeps the home, or measures one that exists. Each command runs in
a process of its own. Prints the wall time and the processor time (user and system, with children) of the best round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from uuid import uuid4

import torch

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.files import sha256_bytes
from lora_engine.formats import Card, write_adapter
from registry.entities import ArtifactRef, Execution, Subject, now
from registry.home import Home
from registry.versions.promotion import promote
from registry.versions.versions import Versions

_MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
_GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}
_IMAGES = 24
_START = "from flows.cli import start; start()"


def build_home(folder: Path, count: int, names: int) -> Home:
    """Builds a home with a number of versions, spread evenly over a number of names."""
    home = Home.open(folder)
    with closing(Versions(home)) as versions, _without_sync(versions), tempfile.TemporaryDirectory() as scratch:
        dataset = _put_dataset(versions)
        for number in range(count):
            _add_version(versions, f"style-{number % names:03}", number, dataset, number // names, Path(scratch))
        for name in range(names):
            promote(versions, f"style-{name:03}", count // names, "trial", reason="looks right")
    with closing(Versions(home)):  # opening it syncs MLflow
        return home


def _put_dataset(versions: Versions) -> ArtifactRef:
    images = [f"image {number}".encode() for number in range(_IMAGES)]
    files = {f"pictures/{number}.png": image for number, image in enumerate(images)}
    entries = [
        {"path": path, "sha256": sha256_bytes(image), "width": 32, "height": 32} for path, image in files.items()
    ]
    dataset = versions.store.put_files(
        "manifest", {"manifest.json": json.dumps({"pictures": entries}).encode(), **files}
    )
    subjects = [Subject(sha256_bytes(image), f"{number}.png", "picture") for number, image in enumerate(images)]
    run = versions.lineage.start_run("photos", {})
    _log(versions, run.id, "photos", "ingest", {}, dataset, subjects)
    versions.lineage.finish_run(run.id, "COMPLETED")
    return dataset


def _add_version(versions: Versions, name: str, number: int, dataset: ArtifactRef, earlier: int, scratch: Path) -> None:
    path = scratch / "adapter.safetensors"
    source = torch.Generator().manual_seed(number)
    delta = LoraDelta(torch.randn(2, 4, generator=source), torch.randn(4, 2, generator=source), 2.0)
    write_adapter(path, Adapter({_MODULE: delta}, "sd"), card=Card(title=name))
    adapter = versions.store.put_files("adapter", {path.name: path})
    report = versions.store.put_files("report", {"report.json": f'{{"number": {number}}}'.encode()})
    run = versions.lineage.start_run(name, {"name": name, "seed": number})
    _log(versions, run.id, "adapter", "train", {"dataset": dataset}, adapter)
    _log(versions, run.id, "report", "evaluate", {"adapter": adapter, "dataset": dataset}, report)
    versions.register(
        name,
        adapter,
        path.name,
        report=report,
        run_id=run.id,
        card={"title": name, "base": "sd15", "license": "apache-2.0"},
        metrics={"clip_t": {"base": 0.2, "adapter": 0.3, "difference": 0.1, "better": "higher", "n": 8}},
        gates=[_GATE],
        passed=True,
        parents=[f"{name}@{earlier}"] if earlier and number % 4 == 0 else (),
        alias_request="staging",
        curves={"loss": [(step, 1.0 / (step + 1)) for step in range(20)]},
        params={"rank": 2, "steps": 20},
    )
    versions.lineage.finish_run(run.id, "COMPLETED")


def _log(
    versions: Versions,
    run_id: str,
    step: str,
    uses: str,
    inputs: dict[str, ArtifactRef],
    output: ArtifactRef,
    subjects: Sequence[Subject] = (),
) -> None:
    execution = Execution(
        id=uuid4().hex,
        run_id=run_id,
        step=step,
        uses=uses,
        revision="1",
        key=sha256_bytes(f"{step} {output.sha256}".encode()),
        settings={"settings": {}, "base": {"label": "sd15"}} if uses == "train" else {},
        inputs=inputs,
        output=output,
        status="COMPLETED",
        environment={},
        seed=0,
        started_at=now(),
        ended_at=now(),
    )
    versions.lineage.log_execution(execution, contents=versions.store.files(output), subjects=subjects)


@contextmanager
def _without_sync(versions: Versions) -> Iterator[None]:
    versions.sync = lambda *_arguments, **_options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del versions.sync  # type: ignore[method-assign]


def commands(home: Path, folder: Path) -> dict[str, list[str]]:
    """Returns the commands to measure, by title; those that write change the home."""
    spec = folder / "pipeline.yaml"
    spec.write_text("name: plan\nbase: tiny\nsteps:\n  export: {uses: convert, adapter: style-000@1, to: [kohya]}\n")
    with closing(Versions(Home.open(home))) as versions:
        last = versions.show("style-000").version
    return {
        "list": ["list"],
        "list NAME": ["list", "style-000"],
        "show": ["show", f"style-000@{last}"],
        "lineage": ["lineage", f"style-000@{last}"],
        "lineage --down": ["lineage", "style-000@1", "--down"],
        "log": ["log"],
        "log NAME": ["log", "style-000"],
        "plan": ["plan", str(spec)],
        "status": ["status"],
        "promote": ["promote", "style-000@1", "--to", "trial", "--reason", "a measurement"],
        "rollback": ["rollback", "style-000", "--alias", "trial", "--reason", "a measurement"],
        "backup, first": ["backup", str(folder / "backups")],
        "backup, second": ["backup", str(folder / "backups")],
        "fsck": ["fsck"],
        "gc --dry-run": ["gc", "--dry-run"],
    }


def measure(home: Path, arguments: list[str]) -> tuple[float, float, int]:
    """Runs a command; returns its seconds of wall and of processor time, and its exit code."""
    environment = os.environ | {"LORALINE_HOME": str(home)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _START, *arguments], env=environment, capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in {0, 1}:
        raise RuntimeError(f"{arguments}: {done.stderr.decode()}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--names", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--only", nargs="*", help="Titles of commands.")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home, began = chosen.home or Path(name) / "home", time.perf_counter()
        if not home.is_dir():
            build_home(home, chosen.versions, chosen.names)
            print(f"built {chosen.versions} versions of {chosen.names} names: {time.perf_counter() - began:.0f} s")
        for title, arguments in commands(home, Path(name)).items():
            if chosen.only and title not in chosen.only:
                continue
            rounds = 1 if title.startswith("backup, first") else chosen.rounds
            results = [measure(home, arguments) for _ in range(rounds)]
            wall, processor = (min(result[place] for result in results) for place in (0, 1))
            print(f"{title:16} {wall:7.2f} s wall {processor:7.2f} s processor  exit {results[-1][2]}", flush=True)


if __name__ == "__main__":
    main()
