from __future__ import annotations

import json
import shutil
from io import FileIO
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_files import folder_weights, same_bytes, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from lora_engine.checkpoints import convert_checkpoint, inspect_checkpoint
from lora_engine.errors import AdapterError, BaseModelError, EngineError, SettingsError

TOKENIZERS = ("tokenizer", "tokenizer_2")
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def refuse(path: Path, tmp_path: Path, match: str, error: type[EngineError] = BaseModelError, **options: object) -> str:
    out = tmp_path / "out"
    with pytest.raises(error, match=match) as caught:
        convert_checkpoint(path, out, to="diffusers", **options)
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))
    return str(caught.value)


def test_a_partial_checkpoint_is_refused_with_the_missing_tensors(
    folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path
) -> None:
    gone = "first_stage_model.decoder.conv_out.bias"
    path = save({name: t for name, t in small.items() if name != gone}, tmp_path / "p.safetensors")
    assert gone in refuse(path, tmp_path, "1 tensors are missing", config=folders["sd15"])
    assert inspect_checkpoint(path)["missing"] == [gone]


def test_a_unet_alone_is_refused_with_the_missing_components(
    folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save({n: t for n, t in small.items() if n.startswith("model.")}, tmp_path / "unet.safetensors")
    assert "and 436 more" in refuse(path, tmp_path, "444 tensors are missing: cond_stage_model", config=folders["sd15"])


def test_unknown_tensors_are_refused_unless_they_may_be_dropped(
    folders: dict[str, Path], small: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save(small | {"model.diffusion_model.surprise.weight": torch.ones(1)}, tmp_path / "s.safetensors")
    refuse(path, tmp_path, r"1 tensors are unknown: model\.diffusion_model\.surprise", config=folders["sd15"])
    convert_checkpoint(path, tmp_path / "out", to="diffusers", config=folders["sd15"], drop_unknown=True)
    same_bytes(folder_weights(folders["sd15"]), folder_weights(tmp_path / "out"))


def test_other_widths_than_the_published_are_refused_without_their_settings(
    singles: dict[str, Path], tmp_path: Path
) -> None:
    message = refuse(singles["sd15"], tmp_path, "do not fit the settings", without_tokenizer=True)
    assert "`config`" in message


@pytest.mark.parametrize("length", [4, 1000, -1000])
def test_a_truncated_file_is_refused(length: int, singles: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(singles["sd15"].read_bytes()[:length])
    refuse(path, tmp_path, "t.safetensors", EngineError)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["conditioner.embedders.0.model.ln_final.weight", CONV_IN], "refiner of SDXL"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "an adapter"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one component of a diffusers folder"),
        (["something.weight"], "its 1 tensors begin with 'something.weight'"),
    ],
)
def test_a_file_that_is_no_base_is_named(names: list[str], what: str, tmp_path: Path) -> None:
    path = save({name: torch.ones(4, 4, 3, 3) for name in names}, tmp_path / "x.safetensors")
    refuse(path, tmp_path, what)
    assert what in inspect_checkpoint(path)["problem"]


def test_a_unet_that_reads_other_channels_is_named(small: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(small | {CONV_IN: torch.ones(8, 8, 3, 3)}, tmp_path / "x.safetensors")
    refuse(path, tmp_path, "InstructPix2Pix")


@pytest.mark.usefixtures("forked_readers")
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "x.ckpt")
    refuse(tmp_path / "x.ckpt", tmp_path, "no tensors by name")


def test_an_unknown_architecture_or_target_is_refused(singles: dict[str, Path], tmp_path: Path) -> None:
    refuse(singles["sd15"], tmp_path, "'sd17'.*sd15, sd2", SettingsError, architecture="sd17")
    with pytest.raises(SettingsError, match="diffusers, original, ldm"):
        convert_checkpoint(singles["sd15"], tmp_path / "out", to="gguf")  # type: ignore[arg-type]


def test_a_folder_that_holds_something_is_not_written_into(
    folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(BaseModelError, match="already exists"):
        convert_checkpoint(
            singles["sd15"], tmp_path / "out", to="diffusers", config=folders["sd15"], without_tokenizer=True
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_failure_in_the_middle_leaves_nothing(
    folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_engine.checkpoints import tensor_files

    class Truncated(FileIO):
        """A file without bytes."""

        def readinto(self, buffer: object, /) -> int:
            return 0

    monkeypatch.setattr(tensor_files, "FileIO", Truncated)
    refuse(singles["sd15"], tmp_path, "was truncated", config=folders["sd15"])


def test_an_original_file_is_never_a_pickle(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="only written as safetensors"):
        convert_checkpoint(folders["sd15"], tmp_path / "x.ckpt", to="ldm")


def test_a_folder_with_a_missing_or_unknown_tensor_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folders["sd15"], tmp_path / "broken"))
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file({name: t for name, t in whole.items() if name != "conv_in.bias"}, file)
    with pytest.raises(BaseModelError, match=r"1 tensors are missing: unet: conv_in\.bias"):
        convert_checkpoint(broken, tmp_path / "x.safetensors", to="ldm")
    save_file(whole | {"extra.weight": torch.ones(1)}, file)
    with pytest.raises(BaseModelError, match=r"1 tensors are unknown: unet: extra\.weight"):
        convert_checkpoint(broken, tmp_path / "x.safetensors", to="ldm")
    convert_checkpoint(broken, tmp_path / "x.safetensors", to="ldm", drop_unknown=True)


def test_parts_of_one_tensor_in_two_dtypes_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(folders["sd2"], tmp_path / "mixed"))
    file = mixed / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
    save_file(tensors | {name: tensors[name].half()}, file)
    with pytest.raises(BaseModelError, match="several dtypes"):
        convert_checkpoint(mixed, tmp_path / "x.safetensors", to="ldm")


def test_a_folder_needs_a_tokenizer_or_a_request_for_none(
    folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    bare = _without_tokenizer(folders["sd15"], tmp_path / "bare")
    message = refuse(singles["sd15"], tmp_path, "needs the tokenizer", config=bare)
    assert "vocab.json" in message
    convert_checkpoint(singles["sd15"], tmp_path / "none", to="diffusers", config=bare, without_tokenizer=True)
    assert json.loads((tmp_path / "none/model_index.json").read_text())["tokenizer"] == [None, None]
    for number, tokenizer in enumerate((folders["sd15"], folders["sd15"] / "tokenizer")):
        out = tmp_path / str(number)
        convert_checkpoint(singles["sd15"], out, to="diffusers", config=bare, tokenizer=tokenizer)
        assert (out / "tokenizer/tokenizer_config.json").is_file()
    with pytest.raises(BaseModelError, match="needs the tokenizer"):
        convert_checkpoint(singles["sd15"], tmp_path / "w", to="diffusers", config=folders["sd15"], tokenizer=tmp_path)


def test_a_tokenizer_is_taken_from_the_local_cache(
    folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    vocabulary = {"a</w>": 0, "!": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (snapshot / "vocab.json").write_text(json.dumps(vocabulary))
    (snapshot / "merges.txt").write_text("#version: 0.2\n")
    bare = Path(shutil.copytree(folders["sdxl"], tmp_path / "bare"))
    shutil.rmtree(bare / "tokenizer")
    shutil.rmtree(bare / "tokenizer_2")
    convert_checkpoint(singles["sdxl"], tmp_path / "out", to="diffusers", config=bare)
    pads = [json.loads((tmp_path / f"out/{n}/tokenizer_config.json").read_text())["pad_token"] for n in TOKENIZERS]
    assert pads == ["<|endoftext|>", "!"]
    assert CLIPTokenizer.from_pretrained(str(tmp_path / "out/tokenizer_2"))("a").input_ids == [2, 0, 3]


def test_a_tokenizer_of_another_model_is_refused(
    folders: dict[str, Path], singles: dict[str, Path], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "vocab.json").write_text(json.dumps({"a": 49407}))
    (wrong / "merges.txt").write_text("#version\n")
    refuse(singles["sd15"], tmp_path, "token ID 49407", config=folders["sd15"], tokenizer=wrong)


def test_a_safetensors_file_named_like_a_pickle_is_recognized(singles: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(singles["sd15"], tmp_path / "x.ckpt"))
    refuse(path, tmp_path, "rename it to .safetensors", AdapterError)


def _without_tokenizer(folder: Path, to: Path) -> Path:
    copy = Path(shutil.copytree(folder, to))
    shutil.rmtree(copy / "tokenizer")
    return copy
