"""Captions by models through the command line: pipelines with lineage and cache keys, and the verb `caption`."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lora_engine.bases.tiny import folder as tiny_folder
from lora_engine.data.caption import caption as caption_dataset
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import CaptionSettings, IngestSettings
from lora_engine.errors import BaseModelError, SettingsError
from registry.entities import ArtifactRef, Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.job import prepare_job
from tasks.operations.captions import find_caption_models, report_captions
from tasks.operations.rebuild_plan import pin_models
from tasks.steps.caption import Caption
from tests.flows.commands import loraline_here, say
from tests.flows.shared import draw_noise
from tests.support.color_tagger import write_tagger
from tests.support.untrained_captioners import write_captioner
from tools.tiny_base.images import write_images
from tools.tiny_base.world import full_caption, scenes

COMMIT = "c" * 40
PIPELINE = """\
name: cap
base: tiny
steps:
  photos:   {uses: ingest, images: images/}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions:
    uses: caption
    dataset: prepared
    captioner: {name: vlm, model: CAPTIONER, max_tokens: 6, prompt: "Describe the {class_word}."}
    trigger: sks
    class_word: dog
    edits: [{edit: suffix, text: a photo of grass and sky}]
    check: {base: tiny}
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        draw_noise(folder / f"{seed}.png", seed)
    (folder / "0.txt").write_text("a brown dog on a beach")
    return folder


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("models") / "smol", "idefics3")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("models") / "qwen", "qwen3_vl")


@pytest.fixture
def hub(tmp_path: Path, idefics3: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the snapshot of `org/smol` in an offline cache of the hub."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--smol"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return Path(shutil.copytree(idefics3, repository / "snapshots" / COMMIT))


def run(tmp_path: Path, captioner: object) -> tuple[dict[str, Any], Manifest, dict[str, Any], Execution]:
    """Runs the pipeline; returns outcome, manifest, report and record of the captions."""
    spec = tmp_path / "cap.yaml"
    spec.write_text(PIPELINE.replace("CAPTIONER", str(captioner)))
    outcome = json.loads(say("run", spec, "--json", home=tmp_path / "home"))["outcomes"]["captions"]
    home = Home.open(tmp_path / "home")
    ref = ArtifactRef(**outcome["ref"])
    store = open_store(home)
    manifest = Manifest.model_validate_json(store.read(ref, "manifest.json"))
    report = json.loads(store.read(ref, "captions.json"))
    with closing(Lineage(home.lineage_url)) as lineage:
        record = lineage.executions(output=ref.sha256)[-1]
    return outcome, manifest, report, record


@pytest.mark.usefixtures("prefect_server")
def test_a_pipeline_captions_with_a_hub_model_and_records_revision_and_digest(
    tmp_path: Path, images: Path, hub: Path
) -> None:
    outcome, manifest, report, record = run(tmp_path, "org/smol")
    assert not outcome["cached"]
    assert [image.caption_origin for image in manifest.pictures] == [
        None,
        f"org/smol@{COMMIT[:12]}",
        f"org/smol@{COMMIT[:12]}",
    ]
    captions = [image.caption for image in manifest.pictures]
    assert captions[0] == "a sks dog, a brown dog on a beach, a photo of grass and sky"
    assert all(text.startswith("a sks dog, ") and len(text) > 40 for text in captions)
    model = record.settings["models"]["vlm"]
    assert model["revision"] == COMMIT
    assert model["name"] == "org/smol"
    assert len(model["fingerprint"]) == 64
    assert report["models"]["vlm"] == {
        "label": f"org/smol@{COMMIT[:12]}",
        "fingerprint": model["fingerprint"],
        "revision": COMMIT,
    }
    assert report["models"]["tokenizers"]["label"] == "tiny"
    assert [item["origin"] for item in report["images"]] == [".txt", *[f"org/smol@{COMMIT[:12]}"] * 2]
    assert record.settings["settings"]["captioner"]["prompt"] == "Describe the {class_word}."
    # The name of the model is not in the key, its content is: the same folder elsewhere is a hit.
    again = run(tmp_path, hub)[0]
    assert again["cached"]
    assert again["ref"] == outcome["ref"]
    shown = say("run", tmp_path / "cap.yaml", home=tmp_path / "home")
    assert "captions: 3 images, captions: 1 .txt, 2 org/smol@cccccccccccc" in shown


def test_a_cached_model_with_code_is_refused_with_that_reason(images: Path, hub: Path, tmp_path: Path) -> None:
    (hub / "modeling_x.py").write_text("")
    for name in ("org/smol", f"org/smol@{COMMIT}"):
        failed = loraline_here("caption", images, "--captioner", name, home=tmp_path / "home")
        assert failed.returncode == 1
        assert "the model brings code of its own (modeling_x.py), which is not run" in failed.stderr
    (hub / "modeling_x.py").unlink()
    assert loraline_here("caption", images, "--captioner", f"org/smol@{COMMIT}", home=tmp_path / "home").returncode == 0


@pytest.mark.usefixtures("prefect_server")
def test_another_model_under_the_same_name_captions_again(tmp_path: Path, images: Path, qwen: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(qwen, folder)
    first = run(tmp_path, folder)
    assert not first[0]["cached"]
    assert run(tmp_path, folder)[0]["cached"]
    shutil.rmtree(folder)
    write_captioner(folder, "qwen3_vl", seed=3)
    second = run(tmp_path, folder)
    assert not second[0]["cached"]
    assert second[3].settings["models"]["vlm"]["fingerprint"] != first[3].settings["models"]["vlm"]["fingerprint"]


@pytest.mark.usefixtures("prefect_server")
def test_findings_are_warnings_of_the_run(tmp_path: Path, images: Path, idefics3: Path) -> None:
    for number in range(3):
        (images / f"{number}.txt").write_text("I'm sorry, I can't")
    report = run(tmp_path, idefics3)[2]
    assert {finding["kind"] for finding in report["findings"]} == {"refusal", "alike", "length"}
    shown = say("run", tmp_path / "cap.yaml", home=tmp_path / "home")
    assert "warning   captions: 3 captions are refusals of the captioner (0.png, 1.png, 2.png)" in shown


@pytest.mark.usefixtures("prefect_server")
def test_a_captioner_that_is_missing_stops_before_anything_runs(tmp_path: Path, images: Path) -> None:
    spec = tmp_path / "cap.yaml"
    for name, message in (("nowhere/", "unknown captioner 'nowhere/'"), ("org/none", "'org/none' is not in the local")):
        spec.write_text(PIPELINE.replace("CAPTIONER", name))
        failed = loraline_here("run", spec, home=tmp_path / "home", HF_HUB_OFFLINE="1")
        assert failed.returncode != 0
        assert message in failed.stderr
        assert not list((tmp_path / "home").rglob("manifest.json"))


def test_the_interrogator_of_drawings_is_offered_for_no_base(tmp_path: Path, images: Path) -> None:
    for base in ("tiny", "sdxl"):
        spec = tmp_path / "cap.yaml"
        text = PIPELINE.replace("base: tiny", f"base: {base}", 1)
        spec.write_text(text.replace("{name: vlm, model: CAPTIONER, max_tokens: 6", "{name: interrogator, model: x"))
        failed = loraline_here("plan", spec, home=tmp_path / "home")
        assert failed.returncode != 0
        assert "interrogator" in failed.stderr


def test_a_rebuild_pins_revisions_and_paths() -> None:
    settings = {"captioner": {"name": "vlm", "model": "org/smol", "tagger": {"model": "tags"}, "prompt": "org/smol"}}
    models = {
        "vlm": {"name": "org/smol", "label": "x", "fingerprint": "f", "revision": COMMIT},
        "tagger": {"name": "tags", "label": "x", "fingerprint": "f", "path": "/models/tags"},
    }
    assert pin_models(settings, models) == {
        "captioner": {
            "name": "vlm",
            "model": f"org/smol@{COMMIT}",
            "tagger": {"model": "/models/tags"},
            "prompt": "org/smol",
        }
    }
    assert pin_models({"captioner": "files", "edits": [{"edit": "underscores"}]}, {}) == {
        "captioner": "files",
        "edits": [{"edit": "underscores"}],
    }


TRAINED = """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 2, batch: 2}
  release:  {uses: register, adapter: adapter, name: noise}
"""


@pytest.mark.nightly
@pytest.mark.usefixtures("prefect_server", "trained_here")
def test_a_version_is_reproduced_with_the_recorded_revision_of_the_captioner(
    tmp_path: Path, images: Path, hub: Path
) -> None:
    spec, home = tmp_path / "cap.yaml", tmp_path / "home"
    spec.write_text(PIPELINE.replace("CAPTIONER", "org/smol") + TRAINED)
    say("run", spec, home=home)
    # The branch moves on to another model.
    write_captioner(hub.with_name("d" * 40), "idefics3", seed=1)
    (hub.parents[1] / "refs" / "main").write_text("d" * 40)
    shown = json.loads(say("reproduce", "noise@1", "--json", home=home))
    assert shown["verdict"] == "identical", shown
    shutil.rmtree(hub)
    gone = loraline_here("reproduce", "noise@1", home=home)
    assert gone.returncode != 0
    assert "a model of step 'captions' is missing" in gone.stderr


def test_models_with_code_are_refused_when_a_pipeline_is_planned(tmp_path: Path, qwen: Path) -> None:
    folder = Path(shutil.copytree(qwen, tmp_path / "model"))
    spec = Caption(dataset="photos", captioner={"name": "vlm", "model": "model"})
    assert prepare_job("captions", spec, tmp_path).models["vlm"]["path"] == str(folder.resolve())
    (folder / "modeling_qwen.py").write_text("")
    with pytest.raises(BaseModelError, match="code of its own"):
        prepare_job("captions", spec, tmp_path)


def caption(images: Path, home: Path, *options: object) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(say("caption", images, "--set", "max_tokens=6", "--json", *options, home=home))
    return facts


def test_the_verb_writes_text_files_and_touches_no_existing_one(tmp_path: Path, images: Path, idefics3: Path) -> None:
    home = tmp_path / "home"
    before = sorted(images.iterdir())
    shown = say("caption", images, "--captioner", idefics3, "--dry-run", "--set", "max_tokens=6", home=home)
    assert "caption   1.png: " in shown
    assert sorted(images.iterdir()) == before
    own = (images / "0.txt").stat()
    facts = caption(images, home, "--captioner", idefics3, "--trigger", "sks", "--class-word", "dog")
    assert facts["written"] == {"1.png": "1.txt", "2.png": "2.txt"}
    assert facts["kept"] == ["0.png"]
    assert (images / "0.txt").stat() == own
    assert (images / "1.txt").read_text().startswith("a sks dog, ")
    assert sorted(path.name for path in images.iterdir()) == ["0.png", "0.txt", "1.png", "1.txt", "2.png", "2.txt"]
    assert caption(images, home, "--captioner", idefics3)["written"] == {}
    replaced = caption(images, home, "--captioner", idefics3, "--existing", "replace", "--base", "tiny")
    assert set(replaced["written"]) == {"0.png", "1.png", "2.png"}
    assert "brown" not in (images / "0.txt").read_text()
    assert set(replaced["models"]) == {"vlm", "tokenizers"}
    appended = caption(images, home, "--captioner", idefics3, "--existing", "append", "--prompt", "Other.")
    assert appended["captions"]["0.png"]["origin"] == ".txt + smol"


def test_files_that_the_verb_would_harm_are_left(tmp_path: Path, images: Path, idefics3: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (images / "1.txt").symlink_to(outside)
    (images / "2.txt").write_bytes(b"x" * 1_000_000)
    draw_noise(images / "3.png", 9)
    draw_noise(images / "3.jpg", 10)
    facts = caption(images, tmp_path / "home", "--captioner", idefics3)
    assert facts["left"] == ["1.png", "2.png"]
    assert facts["written"] == {"3.jpg": "3.jpg.txt", "3.png": "3.png.txt"}
    caption(images, tmp_path / "home", "--captioner", idefics3, "--existing", "replace")
    assert outside.read_text() == "mine"
    assert not (images / "1.txt").is_symlink()


def test_the_verb_tags_and_chains(tmp_path: Path, images: Path, idefics3: Path) -> None:
    pytest.importorskip("onnxruntime", reason="taggers need the extra 'taggers'")
    tagger = write_tagger(tmp_path / "tagger")
    options = ("--existing", "replace", "--dry-run", "--json")
    facts = json.loads(
        say("caption", images, "--tagger", tagger, "--set", "general=0.01", *options, home=tmp_path / "home")
    )
    assert "red sky" in facts["captions"]["0.png"]["caption"]
    assert facts["captions"]["0.png"]["origin"] == "tagger"
    chained = caption(images, tmp_path / "home", "--captioner", idefics3, "--tagger", tagger, "--dry-run")
    assert chained["captions"]["1.png"]["origin"] == "smol + tagger"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no model"),
        (["--tagger", "x/y", "--prompt", "a"], "a tagger has no prompt"),
        (["--captioner", "MODEL", "--set", "max_tokens=0"], "captioner"),
        (["--captioner", "MODEL", "--prompt", "{secret}"], "may hold"),
        (["--captioner", "MODEL", "--trigger", "two words"], "trigger"),
    ],
)
def test_a_wrong_option_of_the_verb_is_refused(
    images: Path, tmp_path: Path, idefics3: Path, options: list[str], message: str
) -> None:
    given = [str(idefics3) if option == "MODEL" else option for option in options]
    failed = loraline_here("caption", images, *given, home=tmp_path / "home")
    assert failed.returncode == 1
    assert message in failed.stderr
    assert sorted(path.name for path in images.iterdir()) == ["0.png", "0.txt", "1.png", "2.png"]


def test_dataset_checks_trigger_and_captions_against_a_base(images: Path, tmp_path: Path) -> None:
    (images / "1.txt").write_text("a red star " * 20)
    (images / "2.txt").write_text("Sure, a red star")
    shown = say("dataset", images, "--trigger", "star", "--base", "tiny", home=tmp_path / "home")
    assert "the trigger 'star' is one token of the base's tokenizer" in shown
    assert "1 captions have more than the 32 tokens that the base reads (up to 62) (1.png)" in shown
    assert "1 captions repeat themselves (1.png)" in shown
    assert "1 captions begin with an introduction" in shown
    assert "the trigger" not in say("dataset", images, home=tmp_path / "home")


@pytest.fixture
def scenes_folder(tmp_path: Path) -> Path:
    """Returns drawn scenes; two of them have the captions of each other."""
    folder = tmp_path / "images"
    folder.mkdir()
    selected = scenes(5, 12)
    captions = [full_caption(scene) for scene in selected]
    files = sorted(path for path in write_images(folder, selected, captions) if path.suffix == ".png")
    for path, text in zip(files, [captions[1], captions[0], *captions[2:]], strict=True):
        path.with_suffix(".txt").write_text(text)
    return folder


def test_dataset_compares_captions_with_their_images(scenes_folder: Path, tmp_path: Path) -> None:
    clip = tiny_folder() / "clip"
    shown = say("dataset", scenes_folder, "--clip", clip, home=tmp_path / "home")
    assert "fit their images less than most captions of other images, by CLIP" in shown
    assert "by CLIP" not in say("dataset", scenes_folder, home=tmp_path / "home")
    failed = loraline_here("dataset", scenes_folder, "--clip", tmp_path / "nowhere", home=tmp_path / "home")
    assert failed.returncode == 1
    assert "unknown embedder" in failed.stderr


def test_scores_are_in_the_report_of_the_step(scenes_folder: Path, tmp_path: Path) -> None:
    clip = str(tiny_folder() / "clip")
    settings = CaptionSettings(check={"clip": clip})
    ingest(scenes_folder, tmp_path / "dataset", IngestSettings())
    manifest = caption_dataset(tmp_path / "dataset", tmp_path / "out", settings)
    models = find_caption_models(settings, Path())
    findings = report_captions(tmp_path / "out", manifest, settings, models)
    assert [finding.kind for finding in findings if finding.kind == "unlike"] == ["unlike"]
    report = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert all(-1 <= item["clip_score"] <= 1 for item in report["images"])
    assert "path" not in report["models"]["clip"]
    with pytest.raises(SettingsError, match=r"check\.clip is 'nowhere'"):
        find_caption_models(CaptionSettings(check={"clip": "nowhere"}), tmp_path)
