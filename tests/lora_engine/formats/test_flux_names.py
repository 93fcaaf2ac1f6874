"""Tests FLUX.1's and SD3's names: original and diffusers', dotted and flattened, read without a base, and written."""

import re

import pytest
import torch
from law_adapters import random_delta
from safetensors.torch import save_file

from lora_engine.adapters import Adapter, DoraDelta, FullDelta, LoraDelta, same_delta
from lora_engine.adapters.published import published_module_shapes
from lora_engine.errors import AdapterError
from lora_engine.families import families
from lora_engine.formats import codecs, detect_codec, inspect, read_adapter, write_adapter

FORMATS = ("kohya", "comfyui", "onetrainer", "lycoris", "aitoolkit", "diffusers", "peft", "loraline")
BASES = {"flux": "flux", "sd3": "sd3", "sd35-medium": "sd3", "sd35-large": "sd3"}
WIDTH = 8


@pytest.fixture(scope="module")
def shapes():
    """Returns every adaptable module of the published bases at a reduced width, with the real ratios."""

    def narrow(base):
        wide = published_module_shapes(base)
        unit = {"flux": 3072, "sd3": 1536, "sd35-medium": 1536, "sd35-large": 2432}[base] // WIDTH
        return {
            n: tuple(max(1, size // unit) if n.startswith("transformer") else 4 for size in s) for n, s in wide.items()
        }

    return {base: narrow(base) for base in BASES}


def adapter_of(shapes, family, chosen=lambda name: True, kind="lora"):
    names = [name for name, shape in shapes.items() if len(shape) == 2 and chosen(name) and "embed" not in name]
    modules = {name: random_delta(kind, shapes[name], 1, 2.0, seed) for seed, name in enumerate(names)}
    return Adapter(modules, family)


@pytest.mark.parametrize("base", BASES)
def test_every_module_of_the_transformer_has_an_original_name_and_comes_back(base, shapes):
    names = families[BASES[base]].names
    paths = [name.removeprefix("transformer.") for name in shapes[base] if name.startswith("transformer.")]
    assert len(paths) > 300
    for path in paths:
        target = names.original_of(path)
        assert target is not None, path
        assert path in target.parts
        assert names.find(target.original) == target
        assert names.find(target.original.replace(".", "_"), "_") == target
        assert names.find_canonical(path.replace(".", "_"), "_") == path


@pytest.mark.parametrize("base", BASES)
def test_every_module_of_the_text_encoders_is_found_flattened(base, shapes):
    family = families[BASES[base]]
    paths = [name.partition(".")[::2] for name in shapes[base]]
    assert family.text
    assert {component for component, _ in paths} >= set(family.text)
    for component, path in paths:
        if component in family.text:
            assert family.text[component].names.find_canonical(path.replace(".", "_"), "_") == path


def test_the_tables_of_names_are_those_of_diffusers_own_conversion():
    """Compares with the output of `_convert_kohya_flux_lora_to_diffusers` for one block of each type."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    wide = published_module_shapes("flux")
    selected = [n for n in wide if re.match(r"transformer\.(single_)?transformer_blocks\.0\.(?!.*norm_)", n)]
    adapter = Adapter(
        {n: LoraDelta(torch.full((1, wide[n][1]), 1.0), torch.ones(wide[n][0], 1), 1.0) for n in selected}, "flux"
    )
    tensors, _ = codecs["kohya"].encode(adapter)
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    ours, _ = codecs["diffusers"].encode(adapter)
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("base", ["flux", "sd35-medium"])
def test_every_format_gives_the_adapter_back_without_a_base(form, base, shapes, tmp_path):
    keep = lambda name: re.search(r"(blocks|block|layers)\.[01]\.|transformer\.(?!.*blocks)", name)  # noqa: E731
    adapter = adapter_of(shapes[base], BASES[base], keep)
    if form == "peft":
        adapter = Adapter({n: d for n, d in adapter.modules.items() if n.startswith("transformer")}, adapter.base)
    write_adapter(tmp_path, adapter, format=form)
    back, _ = read_adapter(tmp_path)
    assert back.base == BASES[base]
    assert list(back.modules) == list(adapter.modules)
    if codecs[form].is_lossless(adapter):
        assert back == adapter
    for name, delta in adapter.modules.items():
        weight = torch.zeros(shapes[base][name])
        torch.testing.assert_close(back.modules[name].delta_weight(weight), delta.delta_weight(weight))
    assert read_adapter(tmp_path, shapes[base])[0] == back, "the shapes of the base agree with the inferred ones"


@pytest.mark.parametrize("form", ["kohya", "comfyui", "onetrainer", "lycoris", "loraline"])
@pytest.mark.parametrize("base", ["flux", "sd35-medium"])
def test_formats_with_alphas_hold_an_adapter_of_the_same_rank_exactly(form, base, shapes):
    adapter = adapter_of(shapes[base], BASES[base], lambda name: ".1." in name or "blocks" not in name)
    assert codecs[form].is_lossless(adapter)


@pytest.mark.parametrize(
    ("form", "base", "expected"),
    [
        ("kohya", "flux", "lora_unet_double_blocks_0_img_attn_qkv lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("kohya", "flux", "lora_te3_encoder_block_0_layer_0_SelfAttention_q lora_unet_single_blocks_0_linear1"),
        ("kohya", "sd3", "lora_unet_joint_blocks_0_context_block_attn_qkv lora_unet_joint_blocks_0_x_block_mlp_fc1"),
        (
            "kohya",
            "sd3",
            "lora_te2_text_model_encoder_layers_0_mlp_fc1 lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ),
        ("comfyui", "flux", "diffusion_model.double_blocks.0.img_attn.qkv diffusion_model.final_layer.linear"),
        ("comfyui", "flux", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
        ("comfyui", "sd3", "diffusion_model.joint_blocks.0.x_block.adaLN_modulation.1"),
        (
            "onetrainer",
            "flux",
            "lora_transformer_transformer_blocks_0_attn_to_q lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        ),
        (
            "onetrainer",
            "sd3",
            "lora_transformer_transformer_blocks_0_attn_to_q lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ),
        ("lycoris", "flux", "lycoris_single_transformer_blocks_0_proj_mlp"),
        ("aitoolkit", "flux", "transformer.single_transformer_blocks.0.proj_mlp"),
        ("diffusers", "sd3", "transformer.transformer_blocks.0.attn.add_q_proj"),
    ],
)
def test_programs_find_their_own_names(form, base, expected, shapes):
    adapter = adapter_of(shapes[base], base, lambda name: ".0." in name or "blocks" not in name)
    tensors, _ = codecs[form].encode(adapter)
    modules = {re.sub(r"\.(lora_(down|up|A|B)\.weight|alpha)$", "", key) for key in tensors}
    assert set(expected.split()) <= modules


def test_the_last_norm_has_its_halves_swapped(shapes):
    name = "transformer.norm_out.linear"
    up = torch.arange(2 * WIDTH, dtype=torch.float32)[:, None]
    adapter = Adapter({name: LoraDelta(torch.ones(1, WIDTH), up, 1.0)}, "flux")
    tensors, _ = codecs["kohya"].encode(adapter)
    written = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert written.flatten().tolist() == [*range(8, 16), *range(8)]


def test_only_the_context_of_sd3s_last_block_has_its_halves_swapped():
    path = "transformer.transformer_blocks.{}.norm1_context.linear"
    deltas = {path.format(0): 6 * WIDTH, path.format(23): 2 * WIDTH}
    modules = {n: LoraDelta(torch.ones(1, WIDTH), torch.arange(rows * 1.0)[:, None], 1.0) for n, rows in deltas.items()}
    tensors, metadata = codecs["comfyui"].encode(Adapter(modules, "sd3"))
    ups = [
        tensors[f"diffusion_model.joint_blocks.{n}.context_block.adaLN_modulation.1.lora_up.weight"] for n in (0, 23)
    ]
    assert ups[0].flatten().tolist() == list(range(48))
    assert ups[1].flatten().tolist() == [*range(8, 16), *range(8)]
    back = codecs["comfyui"].decode(tensors, metadata)
    assert all(same_delta(back.modules[name], delta) for name, delta in modules.items())


@pytest.mark.parametrize("width", [1536, 2432])
def test_a_bias_of_sd3s_last_block_is_recognized_by_the_published_widths(width):
    path = "transformer.transformer_blocks.{}.norm1_context.linear"
    biases = {path.format(0): torch.arange(6.0 * width), path.format(23): torch.arange(2.0 * width)}
    adapter = Adapter({name: FullDelta(None, bias) for name, bias in biases.items()}, "sd3")
    tensors, metadata = codecs["comfyui"].encode(adapter)
    first, last = (
        tensors[f"diffusion_model.joint_blocks.{n}.context_block.adaLN_modulation.1.diff_b"] for n in (0, 23)
    )
    assert torch.equal(first, biases[path.format(0)])
    assert torch.equal(last, biases[path.format(23)].roll(width))
    assert codecs["comfyui"].decode(tensors, metadata) == adapter


def test_a_lonely_query_is_written_with_zeros_for_key_and_value(tmp_path):
    names = [f"transformer.{block}.0.attn.to_q" for block in ("transformer_blocks", "single_transformer_blocks")]
    adapter = Adapter({name: random_delta("lora", (WIDTH, WIDTH), 2, 1.0) for name in names}, "flux")
    tensors, metadata = codecs["kohya"].encode(adapter)
    shapes = {key.split(".")[0]: tensor.shape for key, tensor in tensors.items() if key.endswith("lora_up.weight")}
    assert shapes == {"lora_unet_double_blocks_0_img_attn_qkv": (24, 2), "lora_unet_single_blocks_0_linear1": (56, 2)}
    assert codecs["kohya"].decode(tensors, metadata) == adapter


def test_the_width_of_a_missing_mlp_is_taken_from_another_block():
    wide = {"transformer.single_transformer_blocks.0.proj_mlp": random_delta("lora", (12, WIDTH))}
    query = {"transformer.single_transformer_blocks.7.attn.to_q": random_delta("lora", (WIDTH, WIDTH))}
    tensors, _ = codecs["kohya"].encode(Adapter(wide | query, "flux"))
    assert tensors["lora_unet_single_blocks_7_linear1.lora_up.weight"].shape[0] == 3 * WIDTH + 12


def test_unsupported_families_are_inspected_and_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    down, up = torch.ones(1, 2048), torch.ones(8192, 1)
    raw = "lora_unet_blocks_0_mlp_layer1"
    save_file({f"{raw}.lora_down.weight": down, f"{raw}.lora_up.weight": up}, path)
    report = inspect(path)
    assert (report["format"], report["family"]) == ("kohya", "anima")
    with pytest.raises(AdapterError, match=r"Anima \(anima\), a base family that is not supported"):
        read_adapter(path)


def test_names_that_no_flux_has_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({f"lora_unet_double_blocks_0_odd.lora_{n}.weight": torch.ones(2, 2) for n in ("down", "up")}, path)
    with pytest.raises(AdapterError, match="double_blocks_0_odd"):
        read_adapter(path)


@pytest.mark.parametrize("rows", [9, 21, 48])
def test_rows_that_are_not_three_times_the_columns_are_refused(rows, tmp_path):
    raw = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{raw}.lora_down.weight": torch.ones(2, 8), f"{raw}.lora_up.weight": torch.ones(rows, 2)}
    save_file(tensors, tmp_path / "stated.safetensors", {"loraline.base": "flux"})
    with pytest.raises(AdapterError, match=rf"img_attn_qkv.*{rows} rows and 8 columns.*24 rows"):
        read_adapter(tmp_path / "stated.safetensors")
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(AdapterError, match=rf"img_attn_qkv.*{rows} rows and 8 columns.*9216 rows and 3072 columns"):
        read_adapter(tmp_path / "foreign.safetensors")


def test_an_input_magnitude_is_kept_in_diffusers_names_and_refused_in_fused_ones():
    """OneTrainer's DoRA of FLUX."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    inner = random_delta("dora", (WIDTH, WIDTH))
    adapter = Adapter({name: DoraDelta(inner.inner, torch.rand(1, WIDTH))}, "flux")
    tensors, metadata = codecs["onetrainer"].encode(adapter)
    assert tensors["lora_transformer_transformer_blocks_0_attn_to_q.dora_scale"].shape == (1, WIDTH)
    assert detect_codec(tensors, metadata).name == "onetrainer"
    assert codecs["onetrainer"].decode(tensors, metadata) == adapter
    three = {name[:-1] + letter: adapter.modules[name] for letter in "qkv"}
    with pytest.raises(AdapterError, match=r"to_k: .*magnitudes are per input"):
        codecs["kohya"].encode(Adapter(three, "flux"))


def test_original_names_need_a_known_family():
    name = "transformer.transformer_blocks.0.ff.net.2"
    with pytest.raises(AdapterError, match=r"the family of the adapter is unknown.*sd3, flux"):
        codecs["kohya"].encode(Adapter({name: random_delta("lora", (4, 4))}))
    with pytest.raises(AdapterError, match=r"the family of the adapter is ambiguous.*flux, chroma, hunyuan_video"):
        codecs["kohya"].encode(Adapter({name: random_delta("lora", (3072, 12288), 1)}))
    proven = {"transformer.transformer_blocks.12.ff.net.2": random_delta("lora", (1536, 6144), 1)}
    assert "lora_unet_joint_blocks_12_x_block_mlp_fc2.alpha" in codecs["kohya"].encode(Adapter(proven))[0]


def test_one_part_under_two_names_is_refused():
    adapter = Adapter({"transformer.transformer_blocks.0.attn.to_q": random_delta("lora", (WIDTH, WIDTH))}, "flux")
    both = codecs["kohya"].encode(adapter)[0] | codecs["onetrainer"].encode(adapter)[0]
    with pytest.raises(AdapterError, match="in the file twice"):
        codecs["onetrainer"].decode(both, {"loraline.base": "flux"})


def test_read_only_formats_refuse_to_write():
    adapter = Adapter({"transformer.transformer_blocks.0.attn.to_q": random_delta("lora", (WIDTH, WIDTH))}, "flux")
    for form in ("bfl", "xlabs"):
        with pytest.raises(AdapterError, match="can only be read"):
            codecs[form].encode(adapter)


def test_an_adapter_on_the_blocks_alone_is_read_without_a_prefix():
    """PEFT's own state dict has this form."""
    names = ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q")
    tensors = {f"{n}.lora_{f}.weight": torch.ones((1, 3072) if f == "A" else (3072, 1)) for n in names for f in "AB"}
    adapter = detect_codec(tensors, {}).decode(tensors, {"modelspec.architecture": "flux-1-dev/lora"})
    assert (adapter.base, sorted(adapter.modules)) == ("flux", [f"transformer.{name}" for name in names])
