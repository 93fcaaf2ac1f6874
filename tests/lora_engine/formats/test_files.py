"""Tests reading, writing and inspecting adapter files."""

import json

import pytest
import torch
from law_adapters import NAMES, random_delta
from safetensors.torch import save_file

from lora_engine.adapters import Adapter
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import Card, codecs, inspect, read_adapter, read_bundle, write_adapter
from lora_engine.formats.kohya import KohyaCodec
from lora_engine.formats.safetensors_io import read_header, read_safetensors, write_safetensors

WRITTEN = {name for name, codec in codecs.items() if "lora" in codec.key_layout.factor_keys}


@pytest.fixture
def adapter():
    return Adapter({name: random_delta("lora", shape) for name, shape in NAMES.items()}, "sd", "f" * 64)


def test_each_format_has_its_files(adapter, tmp_path):
    written = {
        name: sorted(
            str(file.relative_to(tmp_path / name))
            for file in write_adapter(tmp_path / name, adapter, format=name, module_names=NAMES)
        )
        for name in WRITTEN
    }
    assert written == {
        "loraline": ["adapter.safetensors"],
        "kohya": ["adapter.safetensors"],
        "comfyui": ["adapter.safetensors"],
        "lycoris": ["adapter.safetensors"],
        "onetrainer": ["adapter.safetensors"],
        "aitoolkit": ["adapter.safetensors"],
        "cloneofsimo": ["lora.safetensors"],
        "diffusers": ["pytorch_lora_weights.safetensors"],
        "peft": [
            "text_encoder/adapter_config.json",
            "text_encoder/adapter_model.safetensors",
            "unet/adapter_config.json",
            "unet/adapter_model.safetensors",
        ],
    }
    for name in sorted(name for name in WRITTEN if codecs[name].keeps_alpha):
        assert read_adapter(tmp_path / name, NAMES)[0] == adapter


def test_one_component_is_a_peft_folder_itself(adapter, tmp_path):
    unet = Adapter({name: delta for name, delta in adapter.modules.items() if name.startswith("unet")}, "sd")
    files = write_adapter(tmp_path, unet, format="peft")
    assert {file.name for file in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert read_adapter(tmp_path / "adapter_model.safetensors")[0] == unet
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(name.removeprefix("unet.") for name in unet.modules)


def test_a_path_with_a_suffix_is_the_file(adapter, tmp_path):
    assert write_adapter(tmp_path / "x" / "my.safetensors", adapter) == [tmp_path / "x" / "my.safetensors"]
    assert read_adapter(tmp_path / "x")[0] == adapter
    with pytest.raises(AdapterError, match="is a folder"):
        write_adapter(tmp_path / "my.safetensors", adapter, format="peft")


def test_an_unknown_format_names_the_known(adapter, tmp_path):
    with pytest.raises(SettingsError, match=r"'kohia'.*diffusers, kohya.*did you mean 'kohya'"):
        write_adapter(tmp_path, adapter, format="kohia")


def test_a_dtype_is_cast_on_the_way_out_and_overflow_refused(adapter, tmp_path):
    write_adapter(tmp_path, adapter, dtype=torch.float16)
    assert read_adapter(tmp_path)[0] == adapter.to(dtype=torch.float16)
    large = Adapter(
        {"unet.a": random_delta("lora", (4, 4)).with_factors({"down": torch.full((2, 4), 1e5), "up": torch.ones(4, 2)})}
    )
    with pytest.raises(
        AdapterError, match=r"module 'unet\.a', factor 'down': 8 of 8 values .* 65504\. Allowed: bfloat16, float32"
    ):
        write_adapter(tmp_path / "large", large, dtype=torch.float16)
    assert not (tmp_path / "large").exists()


def test_an_empty_adapter_is_not_written(tmp_path):
    with pytest.raises(AdapterError, match="no modules"):
        write_adapter(tmp_path / "x", Adapter({}))


def test_a_scale_that_overflows_when_folded_is_refused(tmp_path):
    modules = {
        name: random_delta("lora", (4, 4), alpha=alpha, dtype=torch.float16)
        for name, alpha in (("unet.a", 1e7), ("unet.b", 1.0))
    }
    with pytest.raises(AdapterError, match=r"unet\.a: the scale .* overflow"):
        write_adapter(tmp_path, Adapter(modules), format="diffusers")


@pytest.mark.parametrize("form", sorted(WRITTEN - {"cloneofsimo"}))
def test_inspect_describes_a_file_without_a_base(adapter, form, tmp_path):
    files = write_adapter(tmp_path, adapter, format=form, card=Card(title="Zorb", seed=7))
    report = json.loads(json.dumps(inspect(tmp_path)))
    assert (report["format"], report["family"], report["fingerprint"]) == (
        "kohya" if isinstance(codecs[form], KohyaCodec) else form,
        "sd",
        "f" * 64,
    )
    assert report["kinds"] == {"lora": 7}
    alpha = "3.0" if codecs[form].keeps_alpha else "2.0"  # the rank, since the scale is in a factor
    assert (report["ranks"], report["alphas"], report["dtypes"]) == ({"2": 7}, {alpha: 7}, {"float32": 14})
    assert report["card"]["title"] == "Zorb"
    assert report["card"]["seed"] == 7
    assert report["files"] == {str(file.relative_to(tmp_path)): sha256_file(file) for file in files}
    assert report["size"] == sum(file.stat().st_size for file in files)
    assert len(report["modules"]) == 7


def test_inspect_needs_no_base_for_another_programs_kohya_file(tmp_path):
    tensors, _ = codecs["kohya"].encode(Adapter({"unet.a": random_delta("lora", (4, 4))}))
    save_file(tensors, tmp_path / "a.safetensors")
    assert inspect(tmp_path / "a.safetensors")["modules"] == ["lora_unet_a"]


def test_the_writer_is_canonical_and_atomic(tmp_path):
    tensors = {"b": torch.ones(3, dtype=torch.float16), "a": torch.ones(2, 2), "c": torch.tensor(1.5)}
    metadata = {"z": "1", "a": "\u00e9"}
    write_safetensors(tmp_path / "one", tensors, metadata)
    write_safetensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    written, header = read_safetensors(tmp_path / "one")
    assert header == metadata
    assert all(
        torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_the_body_is_laid_out_as_the_library_does(tmp_path):
    half, whole = (
        (torch.float16, torch.bfloat16),
        (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
    dtypes = (*half, torch.float32, torch.float64, *whole)
    tensors = {f"{number}": torch.full((3, number + 1), 1.0, dtype=dtype) for number, dtype in enumerate(dtypes * 2)}
    write_safetensors(tmp_path / "ours", tensors, {})
    save_file(tensors, tmp_path / "theirs")
    bodies = []
    for name in ("ours", "theirs"):
        content = (tmp_path / name).read_bytes()
        bodies.append(content[8 + int.from_bytes(content[:8], "little") :])
    assert bodies[0] == bodies[1]


def test_a_slice_of_a_tensor_is_written_as_its_values(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    write_safetensors(tmp_path / "x", {"a": whole.t()[1:3]}, {})
    assert torch.equal(read_safetensors(tmp_path / "x")[0]["a"], whole.t()[1:3])


def test_a_broken_card_is_refused_by_name(adapter, tmp_path):
    tensors, metadata = codecs["loraline"].encode(adapter)
    for card in ("{", "[]", '{"seed": "x"}', '{"unknown": 1}'):
        write_safetensors(tmp_path / "a.safetensors", tensors, metadata | {"loraline.card": card})
        with pytest.raises(AdapterError, match=r"a\.safetensors: metadata 'loraline\.card'"):
            read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (None, "adapter_config.json' is missing"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"lora_alpha": "x"}', "alpha is 'x'"),
        ('{"lora_alpha": true}', "alpha is True"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 1}}', "no plain module name"),
        ('{"peft_type": "LOHA", "lora_alpha": 1}', "'LOHA'"),
        ('{"use_dora": true, "lora_alpha": 1}', "use_dora is True"),
    ],
)
def test_a_bad_peft_configuration_is_refused(config, problem, tmp_path):
    tensors = {
        "base_model.model.mid_block.a.lora_A.weight": torch.ones(2, 4),
        "base_model.model.mid_block.a.lora_B.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match=problem) as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


def peft_tensors():
    path = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{path}.lora_A.weight": torch.ones(2, 4), f"{path}.lora_B.weight": torch.ones(4, 2)}


def test_a_standalone_peft_style_file_is_read_with_scale_1_and_a_note(tmp_path):
    save_file(peft_tensors(), tmp_path / "zorb.safetensors")
    bundle = read_bundle(tmp_path / "zorb.safetensors")
    (delta,) = bundle.adapter.modules.values()
    assert torch.equal(delta.delta_weight(torch.zeros(4, 4)), torch.full((4, 4), 2.0))
    assert "scale 1" in bundle.assumptions
    assert inspect(tmp_path / "zorb.safetensors")["assumed"] == bundle.assumptions


def test_a_standalone_file_with_alphas_assumes_nothing(tmp_path):
    tensors = peft_tensors()
    stem = next(iter(tensors)).removesuffix(".lora_A.weight")
    save_file(tensors | {f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "zorb.safetensors")
    bundle = read_bundle(tmp_path / "zorb.safetensors")
    assert [delta.alpha for delta in bundle.adapter.modules.values()] == [1.0]
    assert not bundle.assumptions


@pytest.mark.usefixtures("forked_readers")
def test_weights_that_an_old_peft_pickled_are_read_with_their_configuration(tmp_path):
    torch.save(peft_tensors(), tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_config\.json' is missing"):
        read_bundle(tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4}')
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        bundle = read_bundle(path)
        assert [delta.alpha for delta in bundle.adapter.modules.values()] == [4.0]
        assert not bundle.assumptions


def test_an_unsupported_family_is_named_even_if_its_factors_are_broken(tmp_path):
    # InvokeAI's form for Anima: the magnitude has fewer rows than the Kronecker product.
    stem = "diffusion_model.blocks.0.cross_attn.k_proj"
    factors = {"lokr_w1": torch.ones(8, 2), "lokr_w2": torch.ones(2, 8), "dora_scale": torch.ones(8)}
    save_file({f"{stem}.{name}": tensor for name, tensor in factors.items()}, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert (report["family"], report["kinds"]) == ("anima", {})
    assert "Anima" in report["note"]
    assert "dora_scale" in report["note"]
    with pytest.raises(AdapterError, match=r"for Anima \(anima\)"):
        read_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("prefix", "factors"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in", ("lora_down.weight", "lora_up.weight")),
        ("transformer.single_transformer_blocks.0.proj_out", ("lora_A.weight", "lora_B.weight")),
    ],
)
def test_ai_toolkits_magnitudes_are_per_output(prefix, factors, tmp_path):
    down, up = factors
    tensors = {down: torch.ones(2, 6), up: torch.ones(4, 2), "magnitude": torch.arange(1.0, 5.0)}
    base = {"loraline.base": "flux" if prefix.startswith("transformer") else "sd"}  # no published base is so narrow
    save_file({f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors", base)
    (delta,) = read_adapter(tmp_path / "x.safetensors")[0].modules.values()
    weight = torch.zeros(4, 6)
    norms = (weight + delta.delta_weight(weight)).norm(dim=1)
    torch.testing.assert_close(norms, torch.arange(1.0, 5.0))


def test_a_peft_folder_finds_its_component_or_is_refused(tmp_path):
    tensors = {
        "base_model.model.odd.place.lora_A.weight": torch.ones(2, 4),
        "base_model.model.odd.place.lora_B.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4}')
    assert list(read_adapter(tmp_path, ["text_encoder_2.x", "unet.odd.place"])[0].modules) == ["unet.odd.place"]
    with pytest.raises(AdapterError, match="the component of the module"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ],
)
@pytest.mark.parametrize("level", ["text_model.", ""])
def test_every_naming_of_diffusers_is_read(down, up, level, tmp_path):
    module = f"text_encoder.{level}encoder.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.{down}": torch.ones(2, 5),
        f"{module}.{up}": torch.ones(5, 2),
        f"{module}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, _ = read_adapter(tmp_path, NAMES)
    assert adapter.modules["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"].scale == 0.5


def test_the_header_holds_the_whole_card(adapter, tmp_path):
    card = Card(
        title="t",
        base="tiny",
        base_fingerprint="f",
        trigger="sks",
        class_word="star",
        recipe={"a": [1, {"b": 2.5}]},
        data=["d"],
        seed=1,
        license="CC0-1.0",
        extra={"k": "v"},
    )
    path = write_adapter(tmp_path, adapter, card=card)[0]
    assert read_adapter(path) == (adapter, card)
    assert read_header(path)[1]["k"] == "v"


def test_a_dtype_that_no_writer_should_meet_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"x: tensor 'a': the dtype is torch\.complex64"):
        write_safetensors(tmp_path / "x", {"a": torch.ones(1, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())
