"""Runs pipelines whose steps start at once, in fresh processes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from registry.home import Home
from tasks.devices import device_slot
from tests.faults.points import forked
from tests.faults.work import Tell, without_mlflow
from tests.flows.commands import loraline_here
from tests.flows.conftest import PREPARE, draw_noise
from tests.flows.made import bring_in, run_line, write_random
from tests.flows.shared import DATABASE
from tests.support.color_tagger import write_tagger

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

EVALUATE = "{{uses: evaluate, adapter: one@1, dataset: captions, seeds: 1, steps: 1, max_pictures: 1, seed: {}}}"
CAPTION = "{{uses: caption, dataset: prepared, captioner: files, trigger: sks{}}}"
TRAIN = "{{uses: train, dataset: captions, method: finetune, rank: 2, steps: 2, batch: 2, seed: {}}}"
HELD_OUT = PREPARE.replace("images: images/", "images: images/, heldout: 0.5")
AFTER = """\
  report:  {uses: evaluate, adapter: adapter0, dataset: captions, seeds: 1, steps: 1, max_pictures: 1}
  release: {uses: register, adapter: adapter0, report: report, alias: staging}
  exports: {uses: convert, adapter: adapter0, to: [kohya, diffusers, peft]}
"""


def steps_at_once(evaluations: int, captionings: int, trainings: int) -> dict[str, str]:
    """Returns steps that all depend on steps of `PREPARE` alone."""
    return {
        **{f"report{number}": EVALUATE.format(number) for number in range(evaluations)},
        **{f"words{number}": CAPTION.format(number) for number in range(captionings)},
        **{f"adapter{number}": TRAIN.format(number) for number in range(trainings)},
    }


def line_of(steps: dict[str, str], after: str = "") -> str:
    return HELD_OUT + "".join(f"  {name}: {step}\n" for name, step in steps.items()) + after


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the pipeline file, and a home with a registered adapter and captioned images."""
    folder = tmp_path_factory.mktemp("at-once")
    (folder / "images").mkdir()
    for index in range(4):
        draw_noise(folder / "images" / f"{index}.png", index)
    (folder / "first.yaml").write_text(HELD_OUT + "  release: {uses: register, adapter: one@1}\n")

    def make(tell: Tell) -> None:
        from registry.home import Home

        home = Home.open(folder / "home")
        bring_in(home, write_random(folder / "one.safetensors", 0), "one")
        tell(run_line(folder / "first.yaml", home).ref)

    status, lines = forked(make, before=without_mlflow).finish()
    assert (status, lines) == (0, ["try@1"])
    return folder


def run_at_once(prepared: Path, tmp_path: Path, environment: dict[str, str], text: str) -> str:
    """Runs a pipeline in a fresh process; returns the output."""
    folder = tmp_path / "line"
    shutil.copytree(prepared, folder)
    (folder / "pipeline.yaml").write_text(text)
    command = [sys.executable, "-m", "tests.flows.steps_at_once", str(tmp_path / "report"), "run"]
    done = subprocess.run(
        [*command, str(folder / "pipeline.yaml"), "--concurrency", "1"],
        env=environment | {"LORALINE_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "report").read_text() == ""
    return done.stdout


def test_steps_that_start_at_once_succeed_and_import_nothing_unguarded(
    prepared: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    steps = steps_at_once(evaluations=2, captionings=1, trainings=0)
    lines = run_at_once(prepared, tmp_path, environment, line_of(steps)).splitlines()
    assert {f"{name}: done" for name in steps} <= set(lines)
    assert {f"{name}: cached, verified" for name in ("photos", "prepared", "captions")} <= set(lines)


@pytest.mark.nightly
@pytest.mark.parametrize("attempt", range(10))
def test_many_steps_that_start_at_once_succeed_and_trainings_take_turns(
    prepared: Path, tmp_path: Path, environment: dict[str, str], prefect_database: Path, attempt: int
) -> None:
    del attempt
    # With a server of its own, as a user runs it; the copied database saves that server its migrations.
    shutil.copy(prefect_database, prepared / "home" / "prefect" / DATABASE)
    alone = {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}
    steps = steps_at_once(evaluations=6, captionings=2, trainings=2)
    output = run_at_once(prepared, tmp_path, alone, line_of(steps, AFTER))
    lines = output.splitlines()
    assert {f"{name}: done" for name in steps} <= set(lines)
    assert_in_turns(lines, "adapter0", "adapter1")
    home = tmp_path / "line" / "home"
    assert "staging -> try@2" in output
    assert (home / "reports" / "try-2.html").is_file()
    assert {path.name for path in (home / "exports").glob("try/*/*")} >= {"kohya", "diffusers", "peft"}


def assert_in_turns(lines: list[str], first: str, second: str) -> None:
    """Asserts that one of two trainings made all of its steps before the other's first step."""
    steps = [match.group(1) for line in lines if (match := re.match(rf"({first}|{second}): \d+/\d+ ", line))]
    assert set(steps) == {first, second}
    assert steps == sorted(steps, key=lambda name: name != steps[0])


def test_a_run_without_models_does_not_import_torch(prepared: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom flows.spec import load_spec\n"
        "from tasks.imports import import_for\nfrom tasks.job import prepare_job\n"
        "spec = load_spec(Path(sys.argv[1]))\n"
        "jobs = {name: prepare_job(name, step, spec.folder) for name, step in spec.steps.items()}\n"
        "import_for(jobs[name] for name in ('photos', 'prepared', 'captions'))\n"
        "print('torch' in sys.modules)\n"
        "report = jobs['report0']\n"
        "print('lora_engine.families.sd.model' in report.kind.imports(report.spec, report.folder))\n"
    )
    shutil.copytree(prepared / "images", tmp_path / "images")
    (tmp_path / "pipeline.yaml").write_text(line_of(steps_at_once(evaluations=1, captionings=0, trainings=0)))
    command = [sys.executable, "-c", code, str(tmp_path / "pipeline.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_evaluations_and_captioners_wait_for_the_gpu(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tagger(tmp_path / "tagger")
    tagger = f"{{name: tagger, model: {tmp_path / 'tagger'}, device: cuda}}"
    steps = {
        "report": EVALUATE.format(0),
        "words": f"{{uses: caption, dataset: prepared, captioner: {tagger}, trigger: sks}}",
    }
    monkeypatch.setattr("lora_engine.bases.base.default_device", lambda: "cuda")
    monkeypatch.setattr("tasks.devices.stop_requested", lambda: True)
    shutil.copytree(prepared / "images", tmp_path / "images")
    shutil.copytree(prepared / "home", tmp_path / "home")
    for name, step in steps.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(line_of({name: step}))
        with device_slot(Home.open(tmp_path / "home"), "cuda-0", 1):
            done = loraline_here("run", path, home=tmp_path / "home")
        assert f"step '{name}': stopped while waiting for device 'cuda-0'" in done.stderr
        assert done.returncode != 0
