"""Atomic replacement of folders; wrong settings, stages and parts are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_engine.errors import BaseModelError, SettingsError
from tools.tiny_base.assembly import assemble
from tools.tiny_base.judge import Judge, load_judge, save_judge
from tools.tiny_base.recipe import build, run_stage
from tools.tiny_base.stage import BuildSettings, replace_folder


def test_a_folder_is_replaced_completely(tmp_path: Path) -> None:
    path = tmp_path / "base"
    replace_folder(path, lambda folder: (folder / "old").write_text("1") and None)
    replace_folder(path, lambda folder: (folder / "new").write_text("2") and None)
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_unchanged_if_filling_fails(tmp_path: Path) -> None:
    path = tmp_path / "base"
    replace_folder(path, lambda folder: (folder / "old").write_text("1") and None)

    def fail(folder: Path) -> None:
        (folder / "new").write_text("2")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        replace_folder(path, fail)
    assert [entry.name for entry in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_incomplete_set_of_parts_is_not_assembled(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    with pytest.raises(BaseModelError, match="tokenizer, unet, text_encoder"):
        assemble(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_work_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(SettingsError, match="other settings"):
        build(tmp_path, tmp_path / "out", BuildSettings())


def test_an_unknown_stage_is_refused_and_the_known_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="autoencoder"):
        run_stage("unet", tmp_path)


def test_a_saved_judge_is_loaded_with_its_attributes(tmp_path: Path) -> None:
    judge = Judge()
    save_judge(tmp_path, judge.state_dict())
    loaded = load_judge(tmp_path)
    assert set(loaded.state_dict()) == set(judge.state_dict())
    assert loaded.attributes == judge.attributes


def test_a_judge_without_its_description_or_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"judge\.json"):
        load_judge(tmp_path)
    incomplete = {name: tensor for name, tensor in Judge().state_dict().items() if "texture" not in name}
    with pytest.raises(BaseModelError, match="lacks 2 tensors"):
        save_judge(tmp_path, incomplete)
