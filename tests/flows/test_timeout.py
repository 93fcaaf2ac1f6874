"""Tests the `timeout` of steps, and the table of a run in which a step failed."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from registry.entities import Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.maintenance.fsck import fsck
from tests.flows.commands import loraline_here, say
from tests.flows.conftest import PREPARE

Write = Callable[..., Path]
TRAINED = (
    PREPARE
    + """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 90000, batch: 1, timeout: SECONDS,
             checkpoint_every: 1}
  exports:  {uses: convert, adapter: adapter, to: [kohya]}
"""
)


class Warned(logging.Handler):
    """Collects the texts of log records."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def attempts(home: Path, step: str) -> list[Execution]:
    with closing(Lineage(Home(home).lineage_url)) as lineage:
        return [entry for run in lineage.runs() for entry in lineage.executions(run.id) if entry.step == step]


def table(server: str, key: str) -> dict[str, dict[str, Any]]:
    """Returns the rows, by step, of the only table with a key."""
    query = json.dumps({"artifacts": {"key": {"any_": [key]}}}).encode()
    with urlopen(
        Request(f"{server}/artifacts/filter", query, {"Content-Type": "application/json"}), timeout=60
    ) as answer:
        (artifact,) = json.load(answer)
    return {row["step"]: row for row in json.loads(artifact["data"])}


def test_a_step_that_takes_longer_is_stopped_tried_again_and_leaves_nothing(
    pipeline: Write, home: Path, prefect_server: str
) -> None:
    text = PREPARE.replace("name: try", "name: too-slow")
    spec = pipeline(text.replace("class_word: star", "class_word: star, timeout: 0.02"))
    failed = loraline_here("run", spec, home=home)
    message = (
        "step 'captions': took longer than its timeout of 0.02 s. Fix: raise `timeout`, or give the step less work."
    )
    assert failed.returncode == 1
    assert message in failed.stderr
    tried = attempts(home, "captions")
    assert [entry.status for entry in tried] == ["FAILED"] * 3
    assert {entry.error for entry in tried} == {f"StepTimeout: {message}"}
    assert fsck(Home(home), grace=0) == []
    rows = table(prefect_server, "too-slow")
    assert (rows["captions"]["action"], rows["captions"]["reason"]) == ("failed", message)
    assert (rows["photos"]["action"], rows["photos"]["reason"]) == ("ran", "never ran")
    pipeline(text.replace("images: images/", "images: images/, timeout: 0.02"))
    assert "1 ran, 2 cached" in say("run", spec, home=home), "a timeout is no part of the cache key"


def test_a_step_with_a_timeout_gives_the_same_artifact_or_the_same_error_from_its_process(
    pipeline: Write, home: Path, prefect_server: str
) -> None:
    spec = pipeline(PREPARE)
    say("run", spec, home=home)
    limited = PREPARE.replace("class_word: star", "class_word: star, timeout: 500")
    assert "1 ran, 2 cached" in say("run", pipeline(limited), "--force", "captions", home=home)
    first, second = attempts(home, "captions")
    assert (first.key, first.output) == (second.key, second.output)
    assert second.output is not None

    for image in (spec.parent / "images").iterdir():
        image.write_bytes(b"no image")
    warned = Warned()
    logger = logging.getLogger("lora_engine.data.ingest")
    logger.addHandler(warned)
    failed = [loraline_here("run", spec, "--set", f"photos.timeout={limit}", home=home) for limit in ("null", "500")]
    logger.removeHandler(warned)
    assert len(warned.texts) == 8, "each process warns once of each of the four images"
    assert set(Counter(warned.texts).values()) == {2}
    assert failed[0].returncode == failed[1].returncode != 0
    assert failed[0].stderr == failed[1].stderr != ""
    *_, first, second = attempts(home, "photos")
    assert first.error == second.error != ""


@pytest.mark.usefixtures("trained_here")
def test_a_training_that_takes_longer_writes_a_checkpoint_and_is_tried_again(
    pipeline: Write, home: Path, prefect_server: str
) -> None:
    tried = 0
    for seconds in (3, 20, 120):  # a busy machine needs longer until the first checkpoint
        spec = pipeline(TRAINED.replace("name: try", "name: slow-training").replace("SECONDS", str(seconds)))
        failed = loraline_here("run", spec, home=home)
        assert failed.returncode == 1
        assert f"step 'adapter': took longer than its timeout of {seconds} s." in failed.stderr
        tried += 3
        assert [entry.status for entry in attempts(home, "adapter")] == ["FAILED"] * tried
        (key,) = {entry.key for entry in attempts(home, "adapter")}
        checkpoints = list((home / "cache" / "states" / key / "checkpoints").glob("*.safetensors"))
        if checkpoints:
            break
    assert checkpoints
    assert fsck(Home(home), grace=0) == []
    rows = table(prefect_server, "slow-training")
    assert (rows["adapter"]["action"], rows["exports"]["action"]) == ("failed", "not started")
    assert "upstream step failed" in rows["exports"]["reason"]
