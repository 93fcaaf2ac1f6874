"""Operations that need no base family, through the verbs: adapters of unknown families keep their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from flows.cli import app
from lora_engine.errors import AdapterError, EngineError, UnknownBaseError

LAYOUTS = {
    "unsupported": ("diffusion_model.blocks.0.self_attn.q", "lora_B", "lora_A", (1536, 1536)),
    "unknown": ("strange_blocks_0_layer", "lora_up", "lora_down", (6, 8)),
}
HEADER = {"modelspec.title": "a title", "ss_tag_frequency": "{}"}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def say(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def adapter(folder: Path, layout: str, *, seed: int = 0) -> Path:
    """Writes a LoRA of rank 2 whose delta has the rank 1; the scale is 0.5 in the layout with alpha."""
    module, up, down, (rows, columns) = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(1, columns, generator=generator)
    tensors = {
        f"{module}.{up}.weight": torch.randn(rows, 2, generator=generator),
        f"{module}.{down}.weight": torch.cat([factor, -factor]),
    }
    if layout == "unknown":
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(tensors, folder / f"{layout}{seed}.safetensors", HEADER)
    return folder / f"{layout}{seed}.safetensors"


def delta_in(path: Path, layout: str) -> Tensor:
    module, up, down, _ = LAYOUTS[layout]
    tensors = load_file(path)
    factor = tensors[f"{module}.{down}.weight"].float()
    scale = float(tensors.get(f"{module}.alpha", torch.tensor(float(len(factor))))) / len(factor)
    return scale * tensors[f"{module}.{up}.weight"].float() @ factor


def assert_same_names(path: Path, original: Path) -> None:
    with safe_open(path, "pt") as written, safe_open(original, "pt") as read:
        assert set(written.keys()) == set(read.keys())
        assert HEADER.items() <= written.metadata().items()


@each_layout
def test_resize_keeps_names_header_and_delta(tmp_path: Path, layout: str) -> None:
    file, out = adapter(tmp_path, layout), tmp_path / "out.safetensors"
    report = say("resize", file, "--rank", 1, "-o", out)
    assert report["retained"] == pytest.approx(1)
    assert "names and header are kept" in report["assumed"]
    assert_same_names(out, file)
    torch.testing.assert_close(delta_in(out, layout), delta_in(file, layout), rtol=1e-4, atol=1e-4)
    assert "assumed: " in run("resize", file, "--rank", 1, "-o", out).stdout


@each_layout
def test_merge_adds_the_deltas_under_their_names(tmp_path: Path, layout: str) -> None:
    one, two, out = adapter(tmp_path, layout), adapter(tmp_path, layout, seed=1), tmp_path / "out.safetensors"
    report = say("merge", f"{one}:0.5", f"{two}:0.25", "-o", out)
    assert "the adapters are for one base" in report["assumed"]
    assert_same_names(out, one)
    expected = 0.5 * delta_in(one, layout) + 0.25 * delta_in(two, layout)
    torch.testing.assert_close(delta_in(out, layout), expected, rtol=1e-4, atol=1e-4)


@each_layout
def test_inspect_gives_the_norm_of_each_delta(tmp_path: Path, layout: str) -> None:
    file = adapter(tmp_path, layout)
    expected = float(delta_in(file, layout).double().norm())
    facts = say("inspect", file, "--norms")
    assert list(facts["norms"].values()) == [pytest.approx(expected, rel=1e-4)]
    assert facts["norm"] == pytest.approx(expected, rel=1e-4)
    assert "norm of the change" in run("inspect", file, "--norms").stdout


def test_convert_changes_the_dtype_in_the_format_of_the_file_alone(tmp_path: Path) -> None:
    file, out = adapter(tmp_path, "unsupported"), tmp_path / "out.safetensors"
    done = say("convert", file, "--to", "aitoolkit", "--dtype", "bfloat16", "-o", out)
    assert "names and header are kept" in done["assumed"]
    assert_same_names(out, file)
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}
    with pytest.raises(UnknownBaseError, match="Wan"):
        say("convert", file, "--to", "kohya", "-o", tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_files_of_different_families_or_names_are_not_merged(tmp_path: Path) -> None:
    files = (adapter(tmp_path, "unsupported"), adapter(tmp_path, "unknown"))
    with pytest.raises(AdapterError, match="name modules differently"):
        say("merge", *files, "-o", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@each_layout
def test_a_named_base_is_compared_with_the_names(tmp_path: Path, layout: str) -> None:
    with pytest.raises(EngineError):
        say("resize", adapter(tmp_path, layout), "--rank", 1, "--base", "tiny", "-o", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("unet.mid_block.attentions.0.proj_in", "transformer.transformer_blocks.0.attn.to_q"), "of two denoisers"),
        (("unet", "unet.mid_block.attentions.0.proj_in"), "is a whole component"),
        (("unet.unet.mid_block.attentions.0.proj_in",), "a prefix twice"),
        (("unet.base_model.model.base_model.model.mid_block.attentions.0.proj_in",), "a prefix twice"),
    ],
)
def test_modules_that_no_base_has_together_are_refused(tmp_path: Path, names: tuple[str, ...], problem: str) -> None:
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 4) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.ones(4, 1) for name in names}
    save_file(tensors, tmp_path / "both.safetensors", {"loraline.base": "tiny"})
    with pytest.raises(AdapterError, match=problem):
        say("validate", tmp_path / "both.safetensors")
