"""Runs merges that learn their weights with the images of a version, of a digest and of a folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from lora_engine.bases.vae import resolve_vae
from lora_engine.files import sha256_file
from lora_engine.formats import Card, read_bundle
from registry.policy.ancestry import trace
from registry.versions.revocation import revoke
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here, say
from tests.flows.made import bring_in, write_random
from tests.flows.shared import Trained, draw_noise
from tests.support.untrained import save_tiny_vae

LEARN = ("-m", "learned", "--set", "steps=1", "--set", "timesteps=1", "--set", "learning_rate=0.25")


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


def test_weights_are_learned_on_the_images_of_a_version_a_digest_or_a_folder(trained: Trained, tmp_path: Path) -> None:
    home = trained.home.path
    bring_in(trained.home, write_random(tmp_path / "b.safetensors", 1), "other")
    with closing(Versions(trained.home)) as versions, versions.lineage.database.read() as session:
        (dataset,) = trace(session, trained.version().artifact).datasets
    images = tmp_path / "images"
    images.mkdir()
    draw_noise(images / "one.png", 99)
    (images / "one.txt").write_text("a red zorb")
    learned = {}
    for name, text in {"version": "small@1", "digest": dataset.sha256[:10], "folder": str(images)}.items():
        out = tmp_path / f"{name}.safetensors"
        say("merge", "small@1", "other@1", *LEARN, "--dataset", text, "-o", out, home=home)
        recipe = read_bundle(out).card.recipe
        assert recipe["method"] == "learned"
        learned[name] = recipe["learned_weights"]
        # The first step of Adam moves each weight by the learning rate.
        assert [abs(weight - 1.0) for weight in learned[name]] == pytest.approx([0.25, 0.25], abs=1e-3)
    assert learned["version"] == learned["digest"]
    with closing(Versions(trained.home)) as versions:
        found = revoke(versions, sha256_file(images / "one.png"), reason="r", dry_run=True)
        assert [entry["files"][0]["sha256"] for entry in found.results] == [
            sha256_file(tmp_path / "folder.safetensors")
        ]
        revoke(versions, sha256_file(trained.spec.parent / "images" / "0.png"), reason="r")
        revoke(versions, sha256_file(trained.spec.parent / "images" / "1.png"), reason="r")
        revoke(versions, sha256_file(images / "one.png"), reason="r")
    for text, problem in {"small@1": "contains revoked items", str(images): "the image was revoked"}.items():
        refused = loraline_here(
            "merge", "small@1", "other@1", *LEARN, "--dataset", text, "-o", tmp_path / "no.safetensors", home=home
        )
        assert (refused.returncode, problem in refused.stderr) == (1, True), refused.stderr
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [("other@1", "was made from no datasets"), ("abcdef12", "there is no dataset"), ("nothing", "there is no dataset")],
)
def test_what_names_no_dataset_is_refused(home: Path, tmp_path: Path, text: str, problem: str) -> None:
    from registry.home import Home

    opened = Home.open(home)
    bring_in(opened, write_random(tmp_path / "b.safetensors", 1), "other")
    refused = loraline_here(
        "merge", "other@1", *LEARN, "--dataset", text, "-o", tmp_path / "out.safetensors", home=home
    )
    assert (refused.returncode, problem in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_are_learned_with_the_autoencoder_of_the_training(trained: Trained, tmp_path: Path) -> None:
    save_tiny_vae(tmp_path / "vae")
    images = tmp_path / "images"
    images.mkdir()
    draw_noise(images / "one.png", 99)
    (images / "one.txt").write_text("a red zorb")
    vae = {"name": "vae", "sha256": resolve_vae(str(tmp_path / "vae")).fingerprint()}
    files = [
        write_random(tmp_path / f"{seed}.safetensors", seed, form="loraline", card=Card(recipe={"vae": vae}))
        for seed in (1, 2)
    ]
    learn = ("merge", *files, *LEARN, "--dataset", images, "--base", "tiny", "-o", tmp_path / "out.safetensors")
    refused = loraline_here(*learn, home=trained.home.path)
    assert (refused.returncode, "set vae to the one of the training" in refused.stderr) == (1, True), refused.stderr
    say(*learn, "--vae", tmp_path / "vae", home=trained.home.path)
    assert read_bundle(tmp_path / "out.safetensors").card.recipe["vae"] == vae
    unread = loraline_here("merge", *files, "--vae", "x", "-o", tmp_path / "no.safetensors", home=trained.home.path)
    assert (unread.returncode, "reads no autoencoder" in unread.stderr) == (1, True)
