"""Kills a delivery at each kind of write, fills its disk, and takes its target away; the next delivery completes it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_engine.files import sha256_file
from registry.entities import Event
from registry.home import Home
from registry.versions.promotion import promote, read_log
from registry.versions.versions import Versions
from tests.faults.points import Points, forked
from tests.faults.work import without_mlflow
from tests.flows.shared import Trained, copy_trained, trained_home

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
__all__ = ["trained_home"]

IMPORTED = ("tasks.operations.deliver", "lora_engine.formats", "lora_engine.bases.base", "registry.documents.card")
KINDS = {"open partial", "fsync after open partial", "os.rename", "fsync after os.rename"}


@pytest.fixture
def prepared(trained_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Returns a home whose `production` is a second version, while its target has the first one."""
    for module in IMPORTED:  # before the forks, each of which would repeat it
        import_module(module)

    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    trained = copy_trained(trained_home, tmp_path / "template")
    with closing(Versions(trained.home)) as versions:
        first = versions.show("small", 1)
        files = {name: versions.store.read(first.artifact, name) for name in versions.store.files(first.artifact)}
        artifact = versions.store.put_files("adapter", {**files, "more.json": b"2"})
        gates = {"gates": first.gates, "passed": True, "metrics": first.metrics, "report": first.report}
        versions.register("small", artifact, first.adapter_path, card=first.card, **gates)
        promote(versions, "small", 1, "production", reason="r")
    place(trained.home.path, tmp_path / "template" / "target")
    assert forked(deliver_in(trained.home.path)).finish() == (0, ["done"])
    with closing(Versions(trained.home)) as versions:
        promote(versions, "small", 2, "production", reason="r")
    return trained


def place(home: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    entry = {"name": "web-ui", "to": str(target), "layout": "comfyui"}
    (home / "delivery.yaml").write_text(yaml.safe_dump({"targets": [entry]}))
    return target


def deliver_in(home: Path, kinds: Points | None = None) -> Callable[[Callable[[str], None]], None]:
    from tasks.operations.deliver import deliver_adapters

    def work(tell: Callable[[str], None]) -> None:
        (report,) = deliver_adapters(Home.open(home))
        for kind in kinds.kinds if kinds else ():
            tell(f"point {kind}")
        tell("; ".join(report.problems) or "done")

    return work


def trial(prepared: Trained, folder: Path, points: Callable[[Path], Points]) -> tuple[Path, Path, int, list[str]]:
    """Delivers in a copy of the home, with faults below the target; returns home, target, exit code and lines."""
    copy = copy_trained(prepared.home.path.parent, folder).home.path
    target = place(copy, folder / "target")
    faults = points(target)

    def before() -> None:
        without_mlflow()
        faults.install()

    return copy, target, *forked(deliver_in(copy, faults), before=before).finish()


def state(target: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((target / "small.loraline.json").read_bytes())
    return content


def violations(target: Path) -> list[str]:
    """Returns what a reader may not see: half a file, or a manifest of a finished delivery with other files."""
    manifest = state(target)
    found = [] if manifest["state"] in {"delivering", "delivered"} else [f"state {manifest['state']}"]
    if manifest["state"] == "delivered":
        found += [name for name, file in manifest["files"].items() if sha256_file(target / name) != file["sha256"]]
    return found + [name for name in ("small.safetensors",) if not is_complete(target / name)]


def is_complete(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return bool(list(file.keys()))
    except SafetensorError:
        return False


def exports(home: Path) -> list[Event]:
    with closing(Versions(Home.open(home))) as versions:
        return [event for event in read_log(versions) if event.action == "export"]


@pytest.mark.parametrize(
    ("mode", "every"), [("kill", False), ("full", False), pytest.param("kill", True, marks=pytest.mark.nightly)]
)
def test_a_delivery_that_fails_at_any_kind_of_write_is_completed_by_the_next(
    prepared: Trained, tmp_path: Path, mode: Any, every: bool
) -> None:
    _, target, status, lines = trial(prepared, tmp_path / "counted", lambda folder: Points(str(folder)))
    assert (status, lines[-1]) == (0, "done")
    counts = Counter(line.removeprefix("point ") for line in lines if line.startswith("point "))
    assert set(counts) >= KINDS
    # The first write is the manifest, the last one the manifest again; the adapter file is in between.
    places = [(kind, at) for kind in sorted(KINDS) for at in range(1, counts[kind] + 1)]
    chosen = places if every else [("os.rename", at) for at in range(1, counts["os.rename"] + 1)]
    assert len(chosen) >= 4
    for number, (kind, at) in enumerate(chosen):
        folder = tmp_path / f"{mode}-{number}"
        home, target, status, lines = trial(
            prepared, folder, lambda below, at=at, kind=kind: Points(str(below), at, mode, kind)
        )
        assert status != 0 or lines[-1] != "done" or mode == "full", (kind, at)
        assert violations(target) == [], (kind, at)
        assert forked(deliver_in(home), before=without_mlflow).finish() == (0, ["done"])
        assert (state(target)["state"], state(target)["version"]) == ("delivered", 2)
        assert violations(target) == []
        assert len(exports(home)) == 2, "one of each version, in whichever order it failed"


def test_a_target_that_cannot_be_written_keeps_what_it_had(prepared: Trained, tmp_path: Path) -> None:
    home, target = prepared.home.path, tmp_path / "template" / "target"
    before = (target / "small.safetensors").read_bytes()
    target.chmod(0o555)

    def as_user() -> None:
        without_mlflow()
        if os.geteuid() == 0:
            for path in [home, *home.rglob("*")]:
                os.chown(path, 65534, 65534)
            for parent in [home.parent, *home.parent.parents][:4]:
                parent.chmod(0o755)
            os.seteuid(65534)

    try:
        _, lines = forked(deliver_in(home), before=as_user).finish()
    finally:
        target.chmod(0o755)
    assert "Permission denied" in lines[-1]
    assert (target / "small.safetensors").read_bytes() == before
    assert state(target)["version"] == 1
    target.rename(target.with_name("gone"))
    assert "does not exist" in forked(deliver_in(home), before=without_mlflow).finish()[1][-1]
    assert not target.exists()
    target.with_name("gone").rename(target)
    assert forked(deliver_in(home), before=without_mlflow).finish() == (0, ["done"])
    assert state(target)["version"] == 2
