"""Tests names and shapes of published adapter files: each is detected, and read or refused with the reason."""

import json
import re
from pathlib import Path

import pytest
import torch
from law_adapters import NAMES
from safetensors.torch import save_file

from lora_engine.adapters import DoraDelta
from lora_engine.adapters.published import published_module_shapes
from lora_engine.errors import AdapterError
from lora_engine.formats import inspect, read_adapter, write_adapter

FOLDER = Path(__file__).resolve().parents[3] / "../shared/keylists"
# Name of the list: format, family, kinds, and the number of canonical modules or the error message.
EXPECTED = {
    # These two are samples: the published network reads text of width 1024, not of its own.
    "anima_lora_kohya_format": ("kohya", "", {"lora"}, "in Anima 256 rows and 2048 columns"),
    "anima_lora_peft_format": ("aitoolkit", "", {"lora"}, "in Anima 2048 rows and 1024 columns"),
    "flux_control_lora_format": ("bfl", "flux", {"lora", "replacement"}, 656),
    "flux_dora_onetrainer_format": ("onetrainer", "flux", {"dora"}, 506),
    # Its Kronecker products have no layer's shape: 32 x 96 times 32 x 288 makes 1024 x 27648 for FLUX' 9216 x 3072.
    "flux_lokr_bfl_format": ("comfyui", "", {"lokr"}, "1024 rows and"),
    # Without modulation and header, it may be Chroma's.
    "flux_lora_aitoolkit_format": ("aitoolkit", "", {"lora"}, 418),
    "flux_lora_diffusers_format": ("diffusers", "flux", {"lora"}, 494),
    "flux_lora_kohya_format": ("kohya", "flux", {"lora"}, 494),
    "flux_lora_xlabs_format": ("xlabs", "flux", {"lora"}, 24),
    "krea2_lora_kohya_format": ("kohya", "krea2", {"lora"}, "Krea 2 (krea2), a base family that is not supported"),
    # Queries and keys of two blocks, which five families have.
    "qwen_image_lora_diffusers_format": ("diffusers", "", {"lora"}, 3),
}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the key lists are not beside this checkout")
every = pytest.mark.parametrize("path", [FOLDER / f"{name}.json" for name in EXPECTED], ids=lambda path: path.stem)


def file_of(path, folder):
    """Returns a file with these names and the real widths, which prove the family; of rank 1 for speed."""
    listed = json.loads(path.read_text())["tensors"]
    whole = "lokr" in path.stem
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.rand(shape if whole else of_rank_1(name, shape), generator=generator).half()
        for name, shape in listed.items()
    }
    save_file(tensors, folder / "real.safetensors")
    return folder / "real.safetensors"


def of_rank_1(name, shape):
    if len(shape) == 2 and re.search(r"(down|lora_A)\.weight$", name):
        return [1, shape[1]]
    return [shape[0], 1] if len(shape) == 2 and re.search(r"(up|lora_B)\.weight$", name) else shape


def test_every_list_has_an_expectation():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(EXPECTED)


@every
def test_a_real_file_is_detected_with_its_format_family_and_kinds(path, tmp_path):
    form, family, kinds, _ = EXPECTED[path.stem]
    report = inspect(file_of(path, tmp_path))
    assert (report["format"], report["family"], set(report["kinds"])) == (form, family, kinds)
    assert (report["note"] is None) == (family == "flux")


@every
def test_a_real_file_is_read_whole_or_refused_with_the_reason(path, tmp_path):
    _, family, kinds, expected = EXPECTED[path.stem]
    file = file_of(path, tmp_path)
    if isinstance(expected, str):
        with pytest.raises(AdapterError) as caught:
            read_adapter(file)
        assert expected in str(caught.value)
        return
    adapter, _ = read_adapter(file)
    assert (adapter.base, len(adapter.modules), {delta.kind for delta in adapter.modules.values()}) == (
        family,
        expected,
        kinds,
    )
    assert set(adapter.modules) <= {*published_module_shapes("flux"), *norms(adapter)}
    write_adapter(tmp_path / "again", adapter)
    assert read_adapter(tmp_path / "again")[0] == adapter


def norms(adapter):
    """Returns the RMS norms, which are no adaptable layers of a base."""
    return [name for name in adapter.modules if ".norm_" in name and "norm_out" not in name]


@every
def test_a_real_file_does_not_fit_stable_diffusion(path, tmp_path):
    with pytest.raises(AdapterError, match=r"real\.safetensors"):
        read_adapter(file_of(path, tmp_path), NAMES)


def test_the_magnitudes_of_onetrainers_file_are_per_input(tmp_path):
    adapter, _ = read_adapter(file_of(FOLDER / "flux_dora_onetrainer_format.json", tmp_path))
    assert all(isinstance(delta, DoraDelta) and delta.axis == 1 for delta in adapter.modules.values())
    assert {name.partition(".")[0] for name in adapter.modules} == {"transformer", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("name", ["flux_lora_kohya_format", "flux_lora_diffusers_format", "flux_lora_aitoolkit_format"])
def test_the_shapes_of_real_files_are_those_of_the_published_base(name):
    """Full width, on the meta device: only shapes are compared."""
    listed = json.loads((FOLDER / f"{name}.json").read_text())["tensors"]
    from lora_engine.formats.transformers.names import find_modules

    downs = {key: shape for key, shape in listed.items() if key.endswith(("lora_down.weight", "lora_A.weight"))}
    modules = {key.rsplit(".lora_", 1)[0]: shape for key, shape in downs.items()}
    matches = find_modules(list(modules), ["flux"])
    base = published_module_shapes("flux")
    assert set(matches) == set(modules)
    for raw, module in matches.items():
        names = [f"transformer.{path}" for path in module.target.parts]
        up = listed.get(f"{raw}.lora_up.weight") or listed[f"{raw}.lora_B.weight"]
        assert {base[part][1] for part in names} == {modules[raw][1]}
        assert sum(base[part][0] for part in names) == up[0]
