"""Converts and runs the example with settings of sd-scripts, as the page for users of other trainers shows."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from flows.spec import load_spec
from registry.home import Home
from tasks.steps.train import Train
from tests.flows.commands import say
from tests.flows.made import run_line
from tests.flows.shared import training_here

ROOT = Path(__file__).resolve().parents[2]


def test_the_configuration_of_the_guide_to_sd_scripts_is_converted_and_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    convert, run = (shlex.split(line) for line in block.strip().splitlines())
    assert (convert[:2], run[:2]) == (["loraline", "init"], ["loraline", "run"])
    examples = shutil.copytree(ROOT / "examples", tmp_path / "examples")
    arguments = [str(tmp_path / part) if "/" in part or part == "my-zorb" else part for part in convert[2:]]
    output = say("init", *arguments, home=tmp_path / "home")
    assert "pipeline.yaml" in output
    path = tmp_path / run[2]
    spec = load_spec(path)
    train = spec.steps["adapter"]
    assert isinstance(train, Train)
    assert (train.rank, train.alpha, train.steps, train.save_every, train.clip_skip) == (
        16,
        1.0,
        "2 epochs",
        "1 epoch",
        2,
    )
    assert (train.batch, train.schedule.name) == (4, "constant")
    assert train.targets == ["attention+ff", "unet.*.proj_in", "unet.*.proj_out"]
    quick = "uses: evaluate\n    seeds: 1\n    steps: 1\n    max_pictures: 2"
    path.write_text(path.read_text().replace("uses: evaluate", quick))
    path.write_text(path.read_text().replace('"2 epochs"', "2").replace('"1 epoch"', "1"))
    with training_here():
        version = run_line(path, Home.open(tmp_path / "home"))
    assert version.card["recipe"]["clip_skip"] == 2
    assert len(version.card["data"]) == len(list((examples / "zorb" / "images").glob("*.png")))
