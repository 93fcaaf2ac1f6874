"""Files in the forms that programs and users really write: each has its documented outcome."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_engine.adapters import LoraDelta
from lora_engine.bases.structure import base_module_shapes
from lora_engine.bases.tiny import folder as tiny_folder
from lora_engine.checkpoints import inspect_checkpoint
from lora_engine.errors import AdapterError
from lora_engine.formats import read_bundle, write_adapter
from lora_engine.streaming import fuse, merge_checkpoints
from lora_engine.streaming.extract import extract

FOLDER = Path(__file__).resolve().parents[3] / "../shared/cases/formats"
AMBIGUOUS = "they share these modules"


@dataclass(frozen=True)
class Read:
    """A file that is read, and stored without loss.

    Attributes:
        family: Its family; empty if it is ambiguous, or a U-Net's part.
        kinds: Its kinds.
        assumed: A text in the assumptions; empty means that nothing is assumed.
        scales: Every scale of its LoRA modules.
        written: Format to a text in the names of the tensors that are written in it.
        growth: Largest size in that format by the size of the file.
    """

    family: str = ""
    kinds: tuple[str, ...] = ("lora",)
    assumed: str = ""
    scales: tuple[float, ...] = ()
    written: tuple[str, str] = ("", "")
    growth: float = 2.0

    def check(self, source: Path, folder: Path) -> None:
        file = build(source, folder)
        bundle = read_bundle(file)
        deltas = bundle.adapter.modules.values()
        assert (bundle.adapter.base, {delta.kind for delta in deltas}) == (self.family, set(self.kinds))
        assert self.assumed in bundle.assumptions
        assert bool(self.assumed) == bool(bundle.assumptions)
        scales = {round(delta.scale, 4) for delta in deltas if isinstance(delta, LoraDelta)}
        assert scales == set(self.scales)
        write_adapter(folder / "stored.safetensors", bundle.adapter, card=bundle.card)
        assert read_bundle(folder / "stored.safetensors").adapter == bundle.adapter
        form, name = self.written
        if form:
            (out,) = write_adapter(folder / "out.safetensors", bundle.adapter, format=form, card=bundle.card)
            assert any(name in key for key in load_file(out))
            assert out.stat().st_size <= self.growth * file.stat().st_size


@dataclass(frozen=True)
class Refused:
    """A file that is refused with a text: the name of its family, or the reason."""

    text: str

    def check(self, source: Path, folder: Path) -> None:
        base = re.search(r"^# base: (\w+)", source.read_text(), re.MULTILINE)
        names = base_module_shapes(base[1]) if base else None
        file = build(source, folder)
        with pytest.raises(AdapterError, match=self.text):
            read_bundle(file, names)


class ScaledModel:
    """A fuse into scaled float8 changes the values of the weights, and reports the share that its rounding keeps."""

    def check(self, source: Path, folder: Path) -> None:
        case = import_module(source.stem)
        for name, rounding, least in (("scale_weight", "nearest", 0.5), ("weight_scale", "stochastic", 0.9)):
            out = folder / name
            case.build(str(out), name)
            model, adapter = out / "unet/diffusion_pytorch_model.safetensors", out / "l.safetensors"
            report = fuse(model, [(adapter, 1.0)], out / "fused.safetensors", rounding=rounding, seed=1)
            before, after = load_file(model), load_file(out / "fused.safetensors")
            change = values_of(case, after, name) - values_of(case, before, name)
            factors = load_file(adapter).items()
            up, down = (next(one for key, one in factors if end in key).float() for end in (".lora_up", ".lora_down"))
            share = float((change * (up @ down)).sum() / (up @ down).square().sum())
            assert least < share < 1.1
            assert report.survived == pytest.approx(share, abs=1e-3)


def values_of(case: Any, tensors: dict[str, torch.Tensor], scale: str) -> torch.Tensor:
    return tensors[f"{case.K}.weight"].float() * tensors[f"{case.K}.{scale}"].float()


class AddedDifference:
    """A + B - C of whole models is what its name says, also if A reads a mask (inpainting)."""

    def check(self, source: Path, folder: Path) -> None:
        case, key = import_module(source.stem), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        for is_inpainting in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # the case leaves a file open
                case.build(str(folder), str(tiny_folder()), inpaint=is_inpainting)
            models = [folder / name for name in "ABC"]
            merge_checkpoints(models, (1.0,), folder / f"R{is_inpainting}", method="add-difference")
            first, merged = (load_unet(path) for path in (models[0], folder / f"R{is_inpainting}"))
            change = merged[key].float() - first[key].float()
            torch.testing.assert_close(change, torch.full_like(change, 0.01), atol=1e-3, rtol=0)
            assert merged["conv_in.weight"].shape == first["conv_in.weight"].shape


def load_unet(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "unet/diffusion_pytorch_model.safetensors")


class OriginalModel:
    """A FLUX.1 checkpoint in its original names is recognized, fused into and extracted from without an option."""

    def check(self, source: Path, folder: Path) -> None:
        model = folder / "flux.safetensors"
        sys.argv[1:] = [str(model)]
        runpy.run_path(str(source), run_name="__main__")
        facts = inspect_checkpoint(model)
        assert (facts["layout"], facts["architecture"], facts["unknown"]) == ("original", "flux", [])
        adapter, fused = folder / "flux_lora.safetensors", folder / "fused.safetensors"
        assert fuse(model, [(adapter, 1.0)], fused).modules == 3  # q, k and v of one fused layer
        changed = {name for name, value in load_file(fused).items() if not torch.equal(value, load_file(model)[name])}
        assert changed == {"double_blocks.0.img_attn.qkv.weight"}
        assert len(extract(fused, model, rank=2)[0].modules) == 3


def write_original(path: str) -> None:
    """Writes a small transformer with the names of Black Forest Labs' code."""
    w, draw = 16, torch.Generator().manual_seed(0)
    shapes = {
        "img_in": (w, 16), "txt_in": (w, 32), "time_in.in_layer": (w, 256), "time_in.out_layer": (w, w),
        "vector_in.in_layer": (w, 16), "vector_in.out_layer": (w, w), "final_layer.linear": (16, w),
        "final_layer.adaLN_modulation.1": (2 * w, w), "single_blocks.0.linear1": (7 * w, w),
        "single_blocks.0.linear2": (w, 5 * w), "single_blocks.0.modulation.lin": (3 * w, w),
    }  # fmt: skip
    for side in ("img", "txt"):
        inner = {"attn.qkv": (3 * w, w), "attn.proj": (w, w), "mlp.0": (4 * w, w), "mlp.2": (w, 4 * w)}
        inner["mod.lin"] = (6 * w, w)
        shapes |= {f"double_blocks.0.{side}_{name}": shape for name, shape in inner.items()}
    tensors = {f"{name}.weight": 0.05 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    for norm in ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm"):
        tensors |= {f"{norm}.{part}_norm.scale": torch.ones(8) for part in ("query", "key")}
    save_file(tensors, path)


def write_original_lora(path: str) -> None:
    name, draw = "lora_unet_double_blocks_0_img_attn_qkv", torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 16, generator=draw), torch.randn(48, 2, generator=draw)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}, path
    )


def write_wide(path: Path) -> None:
    """Writes an adapter of FLUX.2 dev, of width 6144, with the names of ComfyUI."""
    helpers = import_module("h")
    helpers.save(helpers.ab("diffusion_model.double_blocks.0.img_attn.qkv", 18432, 6144), path)


ABSENT = {
    "c41_flux2_dev_attn_width6144": {"build": write_wide},
    "ops": {"flux_bfl": write_original, "lora": write_original_lora},
}
"""Modules that cases import and that are not in their folder, with their functions."""
EXPECTED: dict[str, Any] = {
    "c01": Read(assumed=AMBIGUOUS, scales=(0.5,)),
    "c02": Read(assumed=AMBIGUOUS, scales=(0.5,)),
    "c03": Read("sdxl", scales=(0.5,), written=("diffusers", "unet.add_embedding.linear_1.")),
    "c04": Read(scales=(0.5,)),
    "c05": Read("z_image", scales=(0.5,), written=("kohya", "lora_unet_layers_0_attention_to_q.")),
    "c06": Read("z_image", ("lokr",)),
    "c07": Refused("flux2"),
    "c08": Refused("flux2"),
    "c09": Read(assumed=AMBIGUOUS, scales=(1.0,)),
    "c10": Read("flux", scales=(0.5,), written=("onetrainer", "lora_transformer_context_embedder.")),
    "c12": Read(kinds=("full", "lora"), scales=(1.0,)),
    "c13": Read(assumed=AMBIGUOUS, scales=(1.0,)),
    "c14": Read("sd3", scales=(0.5,)),
    "c15": Read(scales=(4.0,)),
    "c16": Read(scales=(8.0, 5.6569)),
    "c17": Read(scales=(0.25, 1.0, 0.75)),
    "c18": Read(scales=(0.5,)),
    "c19": Read(kinds=("dora",)),
    "c20": Read(assumed=AMBIGUOUS, scales=(1.0,)),
    "c21": Read(kinds=("lokr-rows",), assumed=AMBIGUOUS),
    "c22": Read("sdxl", scales=(0.5, 0.25)),
    "c23": Read(assumed=AMBIGUOUS, scales=(1.0,)),
    "c24": Read(assumed=AMBIGUOUS, scales=(1.0,)),
    "c25": Refused("chroma"),
    "c26": Refused("wan"),
    "c27": Read(scales=(0.5,), written=("kohya", ".diff_b")),
    "c29": Read(assumed="alpha is 0 in 1 of 2 modules", scales=(0.0, 0.5)),
    "c30": Read(scales=(-0.5,)),
    "c31": Read(assumed=AMBIGUOUS, scales=(4.0,)),
    "c32": Read(assumed="lora_alpha", scales=(4.0,)),
    "c33": Read(kinds=("oft",), assumed=AMBIGUOUS),
    "c34": Read(kinds=("dora",)),
    "c35": Read(scales=(1.0,)),
    "c36": Refused("a base is needed"),
    "c37": Read("sdxl", scales=(0.5,)),
    "c38": Read("flux", ("loha",)),
    "c40": Read("sd", scales=(0.5,)),
    "c42": Refused("flux2"),
    "c44": Refused("aura_flow"),
    "c45": Refused("ltx2"),
    "c46": Read(assumed=AMBIGUOUS, scales=(1.0,)),
    "c49": Refused("the base's weight"),
    "c50": Refused("flux2"),
    "c51": Refused("the layer has 18432 rows and 6144 columns"),
    "c52": Read("flux", scales=(0.5,)),
    "c53": Read(scales=(0.25, 1.0, 8.0), written=("diffusers", "lora_A")),
    "o01": ScaledModel(),
    "o03": AddedDifference(),
    "o04": OriginalModel(),
}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the cases are not beside this checkout")


def build(source: Path, folder: Path) -> Path:
    """Returns the file that a case builds."""
    import_module(source.stem).build(folder / "case.safetensors")
    return folder / "case.safetensors"


@pytest.fixture(autouse=True)
def case_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    for name, functions in ABSENT.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def test_every_case_has_an_expectation() -> None:
    assert {path.stem[:3] for path in FOLDER.glob("[co]*.py")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_case_has_its_documented_outcome(name: str, tmp_path: Path) -> None:
    (source,) = FOLDER.glob(f"{name}_*.py")
    EXPECTED[name].check(source, tmp_path)
