"""The proof of a family: files that names alone would give to another family, ambiguous files, contradictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.errors import AdapterError
from lora_engine.families.proof import recognize_family
from lora_engine.formats import inspect, read_adapter, read_bundle, write_adapter

Shapes = dict[str, tuple[int, int]]
FLUX_LIKE = ("bria", "longcat_image", "ovis_image")
DOUBLE_STREAM = ("flux", "flux2", "chroma", "hunyuan_video", "qwen_image", *FLUX_LIKE)


def attention(
    blocks: int, width: int, *, prefix: str = "transformer_blocks", name: str = "attn", first: int = 0
) -> Shapes:
    parts = ("to_q", "to_k", "to_v", "to_out.0") if "single" not in prefix else ("to_q", "to_k", "to_v")
    return {
        f"{prefix}.{number}.{name}.{part}": (width, width) for number in range(first, first + blocks) for part in parts
    }


def bfl(double: int, single: int, width: int, *, qkv: int = 3, mlp: int = 4, linear: int = 7, inner: int = 5) -> Shapes:
    """Returns the modules of double and single blocks in Black Forest Labs' names, with factors of the width."""
    shapes: Shapes = {}
    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            shapes |= {f"{block}_attn.qkv": (qkv * width, width), f"{block}_attn.proj": (width, width)}
            shapes |= {
                f"{block}_mlp.0": (mlp * width, width),
                f"{block}_mlp.2": (width, (4 if mlp == 4 else 3) * width),
            }
    for number in range(single):
        block = f"single_blocks.{number}"
        shapes |= {f"{block}.linear1": (linear * width, width), f"{block}.linear2": (width, inner * width)}
    return shapes


def file_of(shapes: Shapes, folder: Path, *, prefix: str = "diffusion_model.", **header: str) -> Path:
    """Writes a LoRA of rank 1 with these modules."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.ones(1, columns, dtype=torch.float16)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.ones(rows, 1, dtype=torch.float16)
    save_file(tensors, folder / "file.safetensors", header or None)
    return folder / "file.safetensors"


def found_in(shapes: Mapping[str, tuple[int, int] | None]) -> tuple[str, ...]:
    return recognize_family({name.replace(".", "_"): shape for name, shape in shapes.items()}).families


FLUX2 = {"mlp": 6, "linear": 9, "inner": 4}
PROVEN = {
    "FLUX.2 klein 4B, double blocks": (bfl(5, 0, 3072, **FLUX2), "flux2"),
    "FLUX.2 klein 4B": (bfl(5, 20, 3072, **FLUX2), "flux2"),
    "FLUX.2 klein 9B, double blocks": (bfl(8, 0, 4096, **FLUX2), "flux2"),
    "FLUX.2 klein 9B, attention, diffusers": (
        {**attention(8, 4096), "transformer_blocks.0.attn.add_q_proj": (4096, 4096)},
        "flux2",
    ),
    "FLUX.2 dev, attention, diffusers": (attention(8, 6144), "flux2"),
    "FLUX.2 dev": (bfl(8, 48, 6144, **FLUX2), "flux2"),
    "HunyuanVideo 1.5, ComfyUI": (bfl(54, 0, 2048), "hunyuan_video_15"),
    "HunyuanVideo 1.5, attention, diffusers": (attention(54, 2048), "hunyuan_video_15"),
    "HunyuanImage, ComfyUI, double blocks": (bfl(20, 0, 3584), "hunyuan_image"),
    "HunyuanVideo, ComfyUI": (bfl(20, 40, 3072), "hunyuan_video"),
    "AuraFlow, diffusers": (attention(4, 3072, prefix="joint_transformer_blocks"), "aura_flow"),
    "FLUX.3, diffusers": (attention(5, 3072, prefix="txt_mode_blocks"), "flux3"),
    "Qwen-Image, attention of a late block": (attention(1, 3072, first=20), "qwen_image"),
    "Qwen-Image 2.1": ({"transformer_blocks.0.img_mlp.gate_layer": (12288, 4096)}, "qwen_image_21"),
    "Qwen-Image 2.1, attention": (attention(32, 4096), "qwen_image_21"),
    "Krea 2, diffusers": (
        {"transformer_blocks.0.attn.to_q": (6144, 6144), "transformer_blocks.0.attn.to_k": (1536, 6144)},
        "krea2",
    ),
    "LTX-2, between video and audio": ({"transformer_blocks.0.audio_to_video_attn.to_q": (2048, 4096)}, "ltx2"),
    "Anima, diffusers": (
        {"transformer_blocks.0.attn1.to_q": (2048, 2048), "transformer_blocks.0.attn2.to_k": (2048, 1024)},
        "anima",
    ),
    "PixArt": (
        {"transformer_blocks.0.attn1.to_q": (1152, 1152), "transformer_blocks.0.ff.net.2": (1152, 4608)},
        "pixart",
    ),
    "Sana": ({"transformer_blocks.0.ff.conv_point": (1152, 2880)}, "sana"),
    "SANA-Video": ({"transformer_blocks.0.ff.conv_temp": (2240, 6720)}, "sana_video"),
    "Kandinsky 2's prior": (attention(20, 2048, name="attn1"), "kandinsky2_prior"),
    "LTX-Video 2B": (attention(28, 2048, name="attn2"), "ltx_video"),
    "FIBO": (attention(8, 3072) | attention(38, 3072, prefix="single_transformer_blocks"), "bria"),
    "Lumina 2": ({"layers.0.attention.qkv": (3840, 2304)}, "lumina2"),
    "Z-Image": ({"layers.0.attention.qkv": (11520, 3840)}, "z_image"),
    "Wan 1.3B": ({"blocks.0.self_attn.q": (1536, 1536), "blocks.0.ffn.0": (8960, 1536)}, "wan"),
    "Stable Diffusion 3 medium, attention": (attention(24, 1536), "sd3"),
}
UNSUPPORTED = {case: entry for case, entry in PROVEN.items() if entry[1] not in ("z_image", "sd3")}


@pytest.mark.parametrize("case", PROVEN)
def test_shapes_and_numbers_tell_families_with_the_same_names_apart(case: str) -> None:
    shapes, family = PROVEN[case]
    assert found_in(shapes) == (family,)


@pytest.mark.parametrize("case", ["FLUX.2 klein 4B, double blocks", "HunyuanImage, ComfyUI, double blocks", "Sana"])
def test_files_of_families_that_are_only_recognized_are_refused_by_name(case: str, tmp_path: Path) -> None:
    shapes, family = UNSUPPORTED[case]
    path = file_of(dict(list(shapes.items())[:12]), tmp_path)
    report = inspect(path)
    assert (report["family"], report["families"]) == (family, [family])
    with pytest.raises(AdapterError, match=rf"{family}\), a base family that is not supported"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("shapes", "families"),
    [
        (attention(5, 3072), DOUBLE_STREAM),
        (attention(6, 3072), tuple(name for name in DOUBLE_STREAM if name != "flux2")),
        (attention(20, 3072), ("hunyuan_video", "qwen_image")),
        (bfl(19, 38, 3072), ("flux", "chroma")),
        (bfl(3, 2, 3072), ("flux", "chroma", "hunyuan_video")),
        ({"single_blocks.37.linear1": (21504, 3072)}, ("flux", "chroma", "hunyuan_video")),
        ({"single_blocks.38.linear1": (21504, 3072)}, ("hunyuan_video",)),
        ({"double_blocks.0.img_mod.lin": (18432, 3072)}, ("flux", "hunyuan_video")),
        ({"distilled_guidance_layer.layers.0.in_layer": (5120, 5120)}, ("chroma",)),
    ],
)
def test_what_fits_several_families_is_said_to_be_so(shapes: Shapes, families: tuple[str, ...]) -> None:
    assert found_in(shapes) == families


def test_an_ambiguous_file_is_read_without_a_family_which_is_reported(tmp_path: Path) -> None:
    path = file_of(attention(2, 3072), tmp_path)
    report = inspect(path)
    assert (report["family"], report["families"]) == ("", list(DOUBLE_STREAM))
    assert "FLUX.1, FLUX.2, Chroma, HunyuanVideo, Qwen-Image, Bria, LongCat-Image or Ovis-Image" in report["note"]
    bundle = read_bundle(path)
    assert bundle.adapter.base == ""
    assert "FLUX.1, FLUX.2" in bundle.assumptions
    with pytest.raises(AdapterError, match=r"ambiguous.*flux, flux2, chroma.*name the base"):
        write_adapter(tmp_path / "out.safetensors", bundle.adapter, format="kohya")
    written = write_adapter(tmp_path / "named.safetensors", bundle.adapter)
    assert "ss_base_model_version" not in inspect(written[0])["metadata"]
    base = {**attention(2, 3072), "single_transformer_blocks.0.norm.linear": (9216, 3072)}
    adapter, _ = read_adapter(path, {f"transformer.{name}": shape for name, shape in base.items()})
    assert adapter.base == "flux"


def test_a_header_decides_between_the_families_that_fit(tmp_path: Path) -> None:
    shapes = dict(list(bfl(1, 1, 3072).items()))
    assert read_adapter(file_of(shapes, tmp_path, ss_base_model_version="flux1"))[0].base == "flux"
    with pytest.raises(AdapterError, match=r"Chroma \(chroma\), a base family that is not supported"):
        read_adapter(file_of(shapes, tmp_path, **{"modelspec.architecture": "chroma/lora"}))


@pytest.mark.parametrize(
    ("shapes", "header"),
    [
        (bfl(1, 0, 3072, **FLUX2), {"ss_base_model_version": "flux1"}),
        (attention(1, 4096), {"modelspec.architecture": "flux-1-dev/lora"}),
        (attention(1, 1536), {"ss_base_model_version": "flux1"}),
        (bfl(1, 1, 3072), {"ss_base_model_version": "sd3"}),
        (bfl(1, 1, 3072), {"ss_base_model_version": "sdxl_base_v1-0"}),
        ({"layers.0.attention.qkv": (11520, 3840)}, {"ss_base_model_version": "lumina2"}),
    ],
)
def test_a_header_that_contradicts_the_shapes_is_refused(shapes: Shapes, header: Any, tmp_path: Path) -> None:
    path = file_of(shapes, tmp_path, **header)
    with pytest.raises(AdapterError, match=r"the header says '.*by its modules the adapter is for .*--base"):
        read_adapter(path)
    assert inspect(path)["family"] == ""
    assert "the header says" in inspect(path)["note"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"single_blocks.0.linear1": (27648, 4096)}, "27648 rows and 4096 columns"),
        ({"joint_blocks.24.x_block.mlp.fc1": (6144, 1536)}, "in block 24.*24 such blocks"),
        ({**attention(1, 3072), "blocks.0.self_attn.q": (3072, 3072)}, "no base family has the modules"),
        (attention(1, 48), "48 rows and 48 columns"),
    ],
)
def test_what_fits_no_family_is_refused_with_place_and_rule(shapes: Shapes, message: str, tmp_path: Path) -> None:
    path = file_of(shapes, tmp_path)
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)
    assert inspect(path)["family"] == ""


def test_a_base_of_any_size_decides_instead_of_the_published_sizes(tmp_path: Path) -> None:
    shapes = {"single_transformer_blocks.0.norm.linear": (144, 48), "transformer_blocks.0.norm1.linear": (288, 48)}
    path = file_of(shapes, tmp_path, prefix="transformer.")
    with pytest.raises(AdapterError, match="48 columns"):
        read_adapter(path)
    assert read_adapter(path, {f"transformer.{name}": shape for name, shape in shapes.items()})[0].base == "flux"


def test_loralines_own_header_is_believed(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    adapter = Adapter({name: LoraDelta(torch.ones(1, 8), torch.ones(8, 1), 1.0)}, "flux")
    write_adapter(tmp_path / "own.safetensors", adapter)
    assert read_adapter(tmp_path / "own.safetensors")[0] == adapter


STATED = {
    "wan": "wan wan_2.1 wan_2.2_14b wan2.1",
    "flux": "flux1 flux-1-dev flux.1 flux",
    "flux2": "flux_2_dev flux_2_klein_4b flux2 flux2_klein_4b Flux.2-dev Flux.2-klein-4b Flux.2",
    "qwen_image": "qwen_image qwen_image_edit qwen_image_layered Qwen-Image Qwen-Image-Edit-Plus Qwen-Image-Edit-2511",
    "z_image": "z_image zimage Z-Image",
    "hunyuan_video": "hunyuan_video hunyuan-video framepack",
    "hunyuan_video_15": "hunyuan_video_1_5 hunyuan-video-1.5",
    "hunyuan_image": "hunyuan-image-2.1",
    "krea2": "krea2 Krea-2",
    "chroma": "chroma Chroma1",
    "lumina2": "lumina2 lumina-2",
    "anima": "anima anima-preview Anima",
    "ltx2": "ltx2",
    "bria": "bria-3.2 fibo",
    "longcat_image": "longcat_image",
    "hidream": "hidream_i1 hidream-i1",
    "sana": "sana",
    "sana_video": "sana_video",
    "pixart": "pixart-sigma",
    "sd3": "sd3 stable-diffusion-3",
    "sd": "sd_v1 sd_v2 sd_v2_v sd_1.5",
    "sdxl": "sdxl_base_v1-0 sd_xl_base_1.0",
}


@pytest.mark.parametrize("family", STATED)
def test_the_header_words_of_trainers_name_one_family(family: str) -> None:
    from lora_engine.formats.family import family_of

    for word in STATED[family].split():
        assert family_of({"ss_base_model_version": word}, {}).possible == (family,), word
