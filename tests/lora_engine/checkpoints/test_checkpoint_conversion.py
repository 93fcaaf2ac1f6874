from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import ARCHITECTURES, folder_weights, same_bytes, save
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_engine.bases.source import resolve_base
from lora_engine.checkpoints import convert_checkpoint, inspect_checkpoint
from lora_engine.errors import BaseModelError


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_round_trip_preserves_every_byte(
    name: str, folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path
) -> None:
    back = tmp_path / "back"
    written = convert_checkpoint(singles[name], back, to="diffusers", config=folders[name])
    same_bytes(folder_weights(folders[name]), folder_weights(back))
    assert sorted(path for path in back.rglob("*") if path.is_file()) == written
    again = convert_checkpoint(back, tmp_path / "again.safetensors", to="ldm")[0]
    same_bytes(load_file(singles[name]), load_file(again))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converted_folder_is_a_base(
    name: str, folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path
) -> None:
    convert_checkpoint(singles[name], tmp_path / "back", to="diffusers", config=folders[name])
    source = resolve_base(str(tmp_path / "back"))
    assert source.family == ("sdxl" if name == "sdxl" else "sd")
    assert source.layout.files == resolve_base(str(folders[name])).layout.files


def test_two_conversions_give_equal_files(folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path) -> None:
    again = convert_checkpoint(folders["sdxl"], tmp_path / singles["sdxl"].name, to="ldm")[0]
    assert again.read_bytes() == singles["sdxl"].read_bytes()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_is_detected_from_the_file(name: str, singles: dict[str, Path]) -> None:
    report = inspect_checkpoint(singles[name])
    assert (report["architecture"], report["variant"]) == (name, "")
    assert report["prediction"] == ("v_prediction" if name == "sd2" else "epsilon")
    assert report["missing"] == report["unknown"] == []
    assert "problem" not in report
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_is_detected_from_the_folder(
    name: str, folders: dict[str, Path], singles: dict[str, Path]
) -> None:
    report, single = inspect_checkpoint(folders[name]), inspect_checkpoint(singles[name])
    assert report["architecture"] == name
    assert report["components"].keys() == single["components"].keys() >= {"unet", "vae", "text_encoder"}
    for component, summary in report["components"].items():
        assert summary["parameters"] == single["components"][component]["parameters"]


def test_every_tensor_keeps_its_own_dtype(folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path) -> None:
    kinds = {"model.": torch.float16, "cond_stage_model.": torch.bfloat16, "first_stage_model.": torch.float32}
    mixed = {name: tensor.to(next(kinds[k] for k in kinds if name.startswith(k))) for name, tensor in small.items()}
    convert_checkpoint(
        save(mixed, tmp_path / "m.safetensors"), tmp_path / "out", to="diffusers", config=folders["sd15"]
    )
    weights = folder_weights(tmp_path / "out")
    of_part = {"unet": torch.float16, "text_encoder": torch.bfloat16, "vae": torch.float32}
    assert all(tensor.dtype == of_part[name.split(".")[0]] for name, tensor in weights.items())
    again = convert_checkpoint(tmp_path / "out", tmp_path / "again.safetensors", to="ldm")[0]
    same_bytes(mixed, load_file(again))


def test_float8_weights_are_copied(folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path) -> None:
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in small.items()}
    convert_checkpoint(
        save(eight, tmp_path / "8.safetensors"), tmp_path / "out", to="diffusers", config=folders["sd15"]
    )
    assert {tensor.dtype for tensor in folder_weights(tmp_path / "out").values()} == {torch.float8_e4m3fn}
    again = convert_checkpoint(tmp_path / "out", tmp_path / "again.safetensors", to="ldm")[0]
    same_bytes(eight, load_file(again))


def test_old_files_without_the_level_text_model_are_read(
    folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path
) -> None:
    old = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in small.items()}
    assert old.keys() != small.keys()
    convert_checkpoint(
        save(old, tmp_path / "old.safetensors"), tmp_path / "out", to="diffusers", config=folders["sd15"]
    )
    same_bytes(folder_weights(folders["sd15"]), folder_weights(tmp_path / "out"))


def test_buffers_schedules_and_averages_are_left_out(
    folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path
) -> None:
    more = {
        "betas": torch.ones(10),
        "alphas_cumprod": torch.ones(10),
        "model_ema.decay": torch.tensor(1.0),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        "first_stage_model.loss.perceptual_loss.net.slice1.0.weight": torch.ones(2),
    }
    path = save(small | more, tmp_path / "more.safetensors")
    convert_checkpoint(path, tmp_path / "out", to="diffusers", config=folders["sd15"])
    same_bytes(folder_weights(folders["sd15"]), folder_weights(tmp_path / "out"))
    assert sum(inspect_checkpoint(path)["unused"].values()) == len(more)


def test_running_averages_are_used_on_request(
    folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path
) -> None:
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in small.items()
        if name.startswith("model.")
    }
    path = save(small | averages, tmp_path / "ema.safetensors")
    convert_checkpoint(path, tmp_path / "out", to="diffusers", config=folders["sd15"], averaged=True)
    plain, averaged = folder_weights(folders["sd15"]), folder_weights(tmp_path / "out")
    same_bytes({n: t + 1 if n.startswith("unet.") else t for n, t in plain.items()}, averaged)


def test_missing_averages_are_refused(singles: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no running averages"):
        convert_checkpoint(singles["sd15"], tmp_path / "o", to="diffusers", config=folders["sd15"], averaged=True)


def test_attention_of_the_autoencoder_may_be_stored_as_matrices(
    folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path
) -> None:
    flat = {name: t[:, :, 0, 0] if ".attn_1." in name and t.ndim == 4 else t for name, t in small.items()}
    assert sum(flat[name].ndim != small[name].ndim for name in small) == 8
    convert_checkpoint(save(flat, tmp_path / "f.safetensors"), tmp_path / "out", to="diffusers", config=folders["sd15"])
    same_bytes(folder_weights(folders["sd15"]), folder_weights(tmp_path / "out"))


def test_folders_of_early_diffusers_are_read(
    folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path
) -> None:
    old = Path(shutil.copytree(folders["sd15"], tmp_path / "old"))
    file = old / "vae" / "diffusion_pytorch_model.safetensors"
    early = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, tensor in load_file(file).items():
        now = next((part for part in early if part in name), "")
        renamed[name.replace(now, early.get(now, ""))] = tensor
    assert sum(".proj_attn." in name for name in renamed) == 4
    save_file(renamed, file)
    text = old / "text_encoder" / "model.safetensors"
    with_level = {f"text_model.{name}": tensor for name, tensor in load_file(text).items()}
    save_file(with_level | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, text)
    again = convert_checkpoint(old, tmp_path / "again.safetensors", to="ldm")[0]
    same_bytes(load_file(singles["sd15"]), load_file(again))


def test_shards_are_read_together(folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    sharded = Path(shutil.copytree(folders["sd15"], tmp_path / "sharded"))
    unet = UNet2DConditionModel.from_pretrained(str(sharded / "unet"))
    (sharded / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(str(sharded / "unet"), max_shard_size="200KB")
    assert len(list((sharded / "unet").glob("*-of-*.safetensors"))) > 1
    again = convert_checkpoint(sharded, tmp_path / "again.safetensors", to="ldm")[0]
    same_bytes(load_file(singles["sd15"]), load_file(again))


@pytest.mark.usefixtures("forked_readers")
def test_a_pickled_checkpoint_becomes_the_same_folder(
    folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"state_dict": small, "global_step": 5, "epoch": 1}, tmp_path / "model.ckpt")
    convert_checkpoint(tmp_path / "model.ckpt", tmp_path / "out", to="diffusers", config=folders["sd15"])
    same_bytes(folder_weights(folders["sd15"]), folder_weights(tmp_path / "out"))


def test_inpainting_is_named_and_converted(folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    nine = small | {key: torch.randn(small[key].shape[0], 9, 3, 3)}
    path = save(nine, tmp_path / "inpainting.safetensors")
    assert inspect_checkpoint(path)["variant"] == "inpainting"
    convert_checkpoint(path, tmp_path / "out", to="diffusers", config=folders["sd15"])
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["in_channels"] == 9
    assert (
        json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    )


def test_the_prediction_type_comes_from_the_file_or_the_caller(
    folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path
) -> None:
    bare = save(load_file(singles["sd2"]), tmp_path / "bare.safetensors")
    assert "the file does not state it" in inspect_checkpoint(bare)["prediction_decided_by"]
    based = save(load_file(bare), tmp_path / "base.safetensors", {"modelspec.prediction_type": "epsilon"})
    assert inspect_checkpoint(based)["architecture"] == "sd2-base"
    for number, (path, options, expected) in enumerate(
        [(bare, {}, "v_prediction"), (based, {}, "epsilon"), (bare, {"architecture": "sd2-base"}, "epsilon"),
         (based, {"prediction": "v_prediction"}, "v_prediction")]
    ):  # fmt: skip
        out = tmp_path / str(number)
        convert_checkpoint(path, out, to="diffusers", config=folders["sd2"], **options)
        assert json.loads((out / "scheduler/scheduler_config.json").read_text())["prediction_type"] == expected


def test_marks_of_a_velocity_sdxl_reach_the_scheduler(
    folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path
) -> None:
    marked = load_file(singles["sdxl"]) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    path = save(marked, tmp_path / "v.safetensors")
    convert_checkpoint(path, tmp_path / "out", to="diffusers", config=folders["sdxl"])
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
