"""Tests what a training and everything after it read of the base and of the original images, through pipeline files."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flows.plan import plan_pipeline
from flows.spec import load_spec
from lora_engine.errors import SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import read_bundle
from registry.entities import AdapterVersion, ArtifactRef
from registry.home import Home
from registry.lineage.record import Lineage
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.execution import execute
from tasks.job import prepare_job
from tests.flows.commands import say
from tests.flows.conftest import PREPARE
from tests.flows.made import run_line, write_random
from tests.flows.shared import training_here
from tests.support.untrained import save_tiny_vae, write_untrained_base

Write = Callable[..., Path]
TRAINED = (
    PREPARE
    + """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 2, batch: 2, precision: fp32}
  release:  {uses: register, adapter: adapter}
"""
)
EVALUATED = TRAINED.replace("base: tiny\n", "base: tiny\nvae: vae\n").replace(
    "precision: fp32", "precision: fp32, clip_skip: 2, prediction: v_prediction, zero_terminal_snr: true"
).replace(
    "  release:  {uses: register, adapter: adapter}",
    "  report: {uses: evaluate, adapter: adapter, dataset: captions, seeds: 1, steps: 2, max_pictures: 1}\n"
    "  release:  {uses: register, adapter: adapter, report: report}",
)  # fmt: skip


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_base(tmp_path_factory.mktemp("base") / "sdxl", "small-sdxl")


def key_of(path: Path, step: str) -> str:
    spec = load_spec(path)
    return prepare_job(step, spec.steps[step], spec.folder).key({})


def run_here(path: Path, home: Path) -> AdapterVersion:
    with training_here():
        return run_line(path, Home.open(home))


def train_here(path: Path, home: Path) -> str:
    """Executes the steps up to the adapter, and returns its digest."""
    spec, opened, outputs = load_spec(path), Home.open(home), dict[str, ArtifactRef]()
    with training_here(), closing(Lineage(opened.lineage_url)) as lineage:
        run = lineage.start_run(spec.name, spec.source)
        for name, step in spec.steps.items():
            if name != "release":
                inputs = {field: (outputs[target],) for field, target, _ in step.references()}
                outputs[name] = execute(prepare_job(name, step, spec.folder), inputs, opened, run.id).ref
        lineage.finish_run(run.id, "COMPLETED")
    return outputs["adapter"].sha256


def test_original_sizes_are_recorded_for_a_base_that_reads_them_alone(pipeline: Write, sdxl: Path) -> None:
    plain = load_spec(pipeline()).steps["prepared"].model_dump()
    assert plain["original_sizes"] is False
    key = key_of(pipeline(), "prepared")
    adapter = "  adapter: {{uses: train, dataset: captions, steps: 1, base: {}}}\n"
    for text in (PREPARE.replace("base: tiny", f"base: {sdxl}"), PREPARE + adapter.format(sdxl)):
        assert load_spec(pipeline(text)).steps["prepared"].model_dump()["original_sizes"] is True
        assert key_of(pipeline(text), "prepared") != key
    off = PREPARE.replace("base: tiny", f"base: {sdxl}").replace("resolution: 32", "resolution: 32, original_sizes: no")
    off = off.replace("sizes: no", "sizes: false")
    assert load_spec(pipeline(off)).steps["prepared"].model_dump()["original_sizes"] is False
    assert key_of(pipeline(off), "prepared") == key


def test_a_training_of_sdxl_reads_the_original_sizes(pipeline: Write, sdxl: Path, tmp_path: Path) -> None:
    digests = []
    for extra in ("", ", original_sizes: false"):
        text = TRAINED.replace("base: tiny", f"base: {sdxl}").replace("resolution: 32", f"resolution: 16{extra}")
        path = pipeline(text)
        Image.new("RGB", (40, 24), "red").save(tmp_path / "images" / "0.png")
        digests.append(train_here(path, tmp_path / "home"))
    assert digests[0] != digests[1]


def test_an_adapter_remembers_what_its_training_changed_of_the_base(
    pipeline: Write, tmp_path: Path, home: Path
) -> None:
    save_tiny_vae(tmp_path / "vae")
    path = pipeline(EVALUATED)
    version = run_here(path, home)
    opened = Home.open(home)
    with closing(Versions(opened)) as versions:
        versions.checkout_adapter(version, tmp_path / "adapter.safetensors")
    recipe = read_bundle(tmp_path / "adapter.safetensors").card.recipe
    assert (recipe["clip_skip"], recipe["prediction"], recipe["zero_terminal_snr"]) == (2, "v_prediction", True)
    assert recipe["vae"]["name"] == "vae"
    with closing(Lineage(opened.lineage_url)) as lineage:
        (step,) = [step for step in lineage.executions() if step.uses == "train"]
    assert step.settings["base"]["vae_fingerprint"] == recipe["vae"]["sha256"]
    say("export", f"try@{version.version}", "--to", "kohya", "-o", tmp_path / "kohya.safetensors", home=home)
    with safe_open(tmp_path / "kohya.safetensors", "pt") as opened_file:
        header = opened_file.metadata()
    assert (header["ss_clip_skip"], header["ss_zero_terminal_snr"], header["ss_vae_name"]) == ("2", "True", "vae")
    assert header["modelspec.prediction_type"] == "v"

    images = {}
    prompt = f"a star <lora:try@{version.version}:1>"
    common = ("-n", 1, "--steps", 2)
    for name, arguments in {
        "own": ("--vae", tmp_path / "vae"),
        "same": ("--vae", tmp_path / "vae", "--clip-skip", 2),
        "other": ("--vae", tmp_path / "vae", "--clip-skip", 1),
    }.items():
        say("generate", prompt, "-o", tmp_path / name, *common, *arguments, home=home)
        images[name] = sha256_file(tmp_path / name / "0.png")
    assert images["own"] == images["same"] != images["other"]
    say("generate", prompt, "-o", tmp_path / "none", *common, home=home, code=1)
    assert not (tmp_path / "none").exists()
    save_tiny_vae(tmp_path / "vae", 2.0)  # another digest: the training and its evaluation run again
    planned = {step.name: step.cached for step in plan_pipeline(load_spec(path), opened).steps}
    assert (planned["captions"], planned["adapter"]) == (True, False)


def test_an_evaluation_with_another_autoencoder_than_the_training_is_refused(
    pipeline: Write, tmp_path: Path, home: Path
) -> None:
    save_tiny_vae(tmp_path / "vae")
    text = EVALUATED.replace("vae: vae\n", "").replace("precision: fp32", "precision: fp32, vae: vae")
    with pytest.raises(
        SettingsError, match=r"trained with the autoencoder 'vae' \(\w{16}\), not with 'that of the base'"
    ):
        run_here(pipeline(text), home)


def test_an_autoencoder_that_is_not_here_is_refused_with_its_line(pipeline: Write) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(pipeline(EVALUATED))
    assert "unknown autoencoder" in str(caught.value)
    assert caught.value.where.endswith("pipeline.yaml:3:1")


def test_a_key_without_the_new_settings_is_that_of_earlier_releases(pipeline: Write) -> None:
    path = pipeline(TRAINED)
    spec = load_spec(path)
    job = prepare_job("adapter", spec.steps["adapter"], spec.folder)
    assert "vae" not in job.key_parts({})
    names = {"vae", "clip_skip", "prediction", "zero_terminal_snr"}
    assert not names & set(json.loads(json.dumps(job.key_parts({})["settings"])))


def test_marks_of_an_imported_kohya_file_are_shown_and_applied(tmp_path: Path, home: Path) -> None:
    plain = write_random(tmp_path / "plain.safetensors", 1)
    marks = {"ss_base_model_version": "sd_v1", "ss_clip_skip": "2", "modelspec.prediction_type": "v"}
    with safe_open(plain, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = {key: text for key, text in file.metadata().items() if not key.startswith("loraline.")}
    save_file(tensors, tmp_path / "marked.safetensors", header | marks)
    save_file(tensors, tmp_path / "unmarked.safetensors", header)
    images = {}
    for name in ("marked", "unmarked"):
        say("import", tmp_path / f"{name}.safetensors", "--name", name, "--license", "MIT", "--base", "tiny", home=home)
        prompt = f"a star <lora:{name}@1:1>"
        say("generate", prompt, "-o", tmp_path / name, "-n", 1, "--steps", 2, home=home)
        images[name] = sha256_file(tmp_path / name / "0.png")
    assert images["marked"] != images["unmarked"]
    shown = json.loads(say("inspect", tmp_path / "marked.safetensors", "--json", home=home))
    assert shown["base_options"] == {"clip_skip": 2, "prediction": "v_prediction"}
    assert json.loads(say("inspect", tmp_path / "unmarked.safetensors", "--json", home=home))["base_options"] == {}


@pytest.mark.nightly
def test_a_pipeline_trains_with_a_split_network_and_with_offloaded_blocks(pipeline: Write, home: Path) -> None:
    adapters = {}
    for name, running in {
        "plain": "{device: cpu}",
        "split": "{device: cpu, processes: 2, shard: true}",
        "offloaded": "{device: cpu, offload: 1.0}",
    }.items():
        text = TRAINED.replace("precision: fp32", f"precision: fp32, running: {running}, rates: {{optimiser: sgd}}")
        path = pipeline(text.replace("name: try", f"name: {name}"))
        say("run", path, home=home)
        say(
            "export",
            f"{load_spec(path).name}",
            "--to",
            "diffusers",
            "-o",
            path.parent / f"{name}.safetensors",
            home=home,
        )
        adapters[name] = load_file(path.parent / f"{name}.safetensors")
    for name in ("split", "offloaded"):
        assert adapters[name].keys() == adapters["plain"].keys()
        for tensor, value in adapters["plain"].items():
            torch.testing.assert_close(adapters[name][tensor], value, rtol=0, atol=1e-6)
