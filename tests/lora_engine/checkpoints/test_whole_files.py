"""Single files with all components of a base with a transformer become the folders that they were made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_engine.bases.base import load_base
from lora_engine.bases.source import resolve_base
from lora_engine.checkpoints import convert_checkpoint, inspect_checkpoint
from lora_engine.checkpoints.convert_whole import plan_whole
from lora_engine.checkpoints.names import component_names, tensor_shapes
from lora_engine.checkpoints.original import OriginalFile
from lora_engine.checkpoints.tensor_files import StoredTensor
from lora_engine.checkpoints.text_names import canonical_text_name
from lora_engine.checkpoints.transformer_names import find_transformer, plan_original
from lora_engine.checkpoints.vae_names import vae_blocks, vae_name
from lora_engine.errors import BaseModelError
from lora_engine.families import families, published
from lora_engine.families.family import ComponentLocation

ROLES = {
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
}
PIPELINES = {"flux": FluxPipeline, "sd3": StableDiffusion3Pipeline}
PROJECTION = "text_encoders.clip_l.transformer.text_projection.weight"


def weights_of(folder: Path, component: str) -> dict[str, Tensor]:
    (file,) = (folder / component).glob("*.safetensors")
    named = load_file(file)
    return {canonical_text_name(name) if "text" in component else name: value for name, value in named.items()}


def whole_tensors(folder: Path, family: str, *, vae: str = "vae.") -> dict[str, Tensor]:
    """Returns the tensors of a folder in the names of ComfyUI's files with all components."""
    transformer = folder.parent / f"{folder.name}-transformer.safetensors"
    convert_checkpoint(folder / "transformer", transformer, to="original")
    tensors = {f"model.diffusion_model.{name}": value for name, value in load_file(transformer).items()}
    for component, role in ROLES[family].items():
        if (folder / component).is_dir():
            named = weights_of(folder, component)
            tensors |= {f"text_encoders.{role}.transformer.{name}": value for name, value in named.items()}
    blocks = vae_blocks(json.loads((folder / "vae" / "config.json").read_text()))
    for name, value in weights_of(folder, "vae").items():
        path, _, leaf = name.rpartition(".")
        is_linear = ".attentions." in name and value.dim() == 2
        tensors[f"{vae}{vae_name(path, blocks)}.{leaf}"] = value[:, :, None, None] if is_linear else value
    return tensors


@pytest.fixture
def folder(request: pytest.FixtureRequest, untrained_base: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(untrained_base(request.param), tmp_path / "base"))


def assert_same_weights(first: Path, second: Path) -> None:
    for component in (path.parent.name for path in second.glob("*/*.safetensors")):
        written, expected = (weights_of(path, component) for path in (first, second))
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("folder", "vae"),
    [("small-flux", "vae."), ("small-sd3", "first_stage_model."), ("small-sd3-without-t5", "vae.")],
    indirect=["folder"],
)
def test_a_file_with_all_components_becomes_its_folder(folder: Path, vae: str, tmp_path: Path) -> None:
    family, file, out = resolve_base(folder).family, tmp_path / "whole.safetensors", tmp_path / "out"
    save_file(whole_tensors(folder, family, vae=vae), file, {"format": "pt"})
    convert_checkpoint(file, out, to="diffusers", config=folder)
    assert_same_weights(out, folder)
    loaded, expected = load_base(out, device="cpu"), load_base(folder, device="cpu")
    assert loaded.modules.keys() == expected.modules.keys()
    assert (type(loaded), out / "tokenizer_2") == (type(expected), next(out.glob("tokenizer_2")))
    facts = inspect_checkpoint(file)
    assert facts["components"].keys() == {path.parent.name for path in folder.glob("*/*.safetensors")}
    assert facts["unknown"] == []
    folder.rename(file.with_suffix(""))  # settings and tokenizers beside the file make it a base
    assert resolve_base(file).family == family


# diffusers reads transformers of FLUX.1 in their published width only, and tells CLIPs by their width.
COMPARED = {
    "small-flux": ("text_encoder", "text_encoder_2", "vae"),
    "small-sd3": ("text_encoder", "text_encoder_3", "transformer", "vae"),
}


@pytest.mark.parametrize("folder", COMPARED, indirect=True)
def test_diffusers_reads_the_same_file_as_the_same_weights(folder: Path, tmp_path: Path) -> None:
    family, file, out = resolve_base(folder).family, tmp_path / "whole.safetensors", tmp_path / "out"
    tensors = whole_tensors(folder, family)
    if family == "sd3":  # diffusers takes the identity, whatever the file has
        tensors[PROJECTION] = torch.eye(len(tensors[PROJECTION]))
    save_file(tensors, file, {"format": "pt"})
    convert_checkpoint(file, out, to="diffusers", config=folder)
    own = {} if family == "sd3" else {"transformer": FluxTransformer2DModel.from_pretrained(out / "transformer")}
    pipeline = PIPELINES[family].from_single_file(str(file), config=str(folder), local_files_only=True, **own)
    for component in COMPARED[f"small-{family}"]:
        ours, theirs = weights_of(out, component), getattr(pipeline, component).state_dict()
        named = {canonical_text_name(name) if "text" in component else name: value for name, value in theirs.items()}
        assert ours.keys() <= named.keys()
        for name, value in ours.items():
            assert torch.equal(named[name], value), name


@pytest.mark.parametrize("folder", ["small-sd3"], indirect=True)
def test_a_projection_that_the_file_lacks_is_the_identity(folder: Path, tmp_path: Path) -> None:
    tensors = whole_tensors(folder, "sd3")
    width = len(tensors.pop(PROJECTION))
    save_file(tensors, tmp_path / "whole.safetensors")
    convert_checkpoint(tmp_path / "whole.safetensors", tmp_path / "out", to="diffusers", config=folder)
    written = weights_of(tmp_path / "out", "text_encoder")["text_projection.weight"]
    assert torch.equal(written.float(), torch.eye(width))


@pytest.mark.parametrize("folder", ["small-flux"], indirect=True)
def test_scaled_text_encoders_are_written_with_their_values(folder: Path, tmp_path: Path) -> None:
    tensors, key = whole_tensors(folder, "flux"), "encoder.block.0.layer.0.SelfAttention.q"
    name = f"text_encoders.t5xxl.transformer.{key}"
    factor = tensors[f"{name}.weight"].abs().max() / 448
    stored = (tensors[f"{name}.weight"] / factor).to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight": stored, f"{name}.scale_weight": factor}
    tensors["text_encoders.t5xxl.transformer.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "whole.safetensors")
    convert_checkpoint(tmp_path / "whole.safetensors", tmp_path / "out", to="diffusers", config=folder)
    written = weights_of(tmp_path / "out", "text_encoder_2")[f"{key}.weight"]
    assert torch.equal(written, (stored.float() * factor).bfloat16())


def without(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(start)}


T5 = "text_encoders.t5xxl.transformer."
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no autoencoder": (lambda tensors: without(tensors, "vae."), r"tensors are missing: vae: vae\."),
    "no text encoder": (lambda tensors: without(tensors, T5), "tensors are missing: text_encoder_2: "),
    "another width": (
        lambda tensors: tensors | {f"{T5}shared.weight": torch.zeros(3, 3)},
        r"shared.weight is \[3, 3\]",
    ),
    "another network": (lambda tensors: tensors | {"control_model.x": torch.zeros(1)}, "unknown: control_model.x"),
}


@pytest.mark.parametrize("folder", ["small-flux"], indirect=True)
def test_a_file_that_is_not_all_of_a_base_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors, file = whole_tensors(folder, "flux"), tmp_path / "whole.safetensors"
    for change, problem in CHANGES.values():
        save_file(change(dict(tensors)), file)
        with pytest.raises(BaseModelError, match=problem):
            convert_checkpoint(file, tmp_path / "out", to="diffusers", config=folder)
    save_file(tensors, file)
    with pytest.raises(BaseModelError, match="do not fit the settings"):
        convert_checkpoint(file, tmp_path / "out", to="diffusers")
    with pytest.raises(BaseModelError, match="settings of all components"):
        convert_checkpoint(file, tmp_path / "out", to="diffusers", config=folder / "transformer")
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match=r"needs the tokenizer_2.*spiece\.model"):
        convert_checkpoint(file, tmp_path / "out", to="diffusers", config=folder)
    assert not (tmp_path / "out").exists()


PUBLISHED = [entry for entry in published.values() if families[entry.family].names is not None]


@pytest.mark.parametrize("name", [entry.name for entry in PUBLISHED])
def test_a_file_of_a_published_base_has_all_of_its_tensors_by_its_settings(name: str) -> None:
    architecture, file = published[name], Path("whole.safetensors")
    family, tensors = families[architecture.family], {}
    for component in ("transformer", "vae", *family.text):
        shapes = tensor_shapes(component, architecture.components[component])
        named = {key: StoredTensor(file, 0, "BF16", shape) for key, shape in shapes.items()}
        if component == "transformer":
            planned = plan_original(family, named, "", "model.diffusion_model.")
            tensors |= {key: StoredTensor(file, 0, "BF16", tensor.shape) for key, tensor in planned.items()}
        elif component == "vae":
            entries = component_names("vae", ComponentLocation("vae.", "vae"), architecture.components["vae"])
            shape = {entry.stored: entry.stored_shape(shapes[entry.name]) for entry in entries}
            tensors |= {key: StoredTensor(file, 0, "BF16", size) for key, size in shape.items()}
        else:
            prefix = f"text_encoders.{family.text[component].role}.transformer.{family.text[component].level}"
            tensors |= {prefix + key: stored for key, stored in named.items()}
    original = OriginalFile(file, tensors, {})
    transformer = find_transformer(tensors, str(file))
    assert transformer is not None
    found, components, plans = plan_whole(original, transformer)
    assert found.name == name
    assert plans.keys() == components.keys() - {"scheduler"} == {"transformer", "vae", *family.text}
