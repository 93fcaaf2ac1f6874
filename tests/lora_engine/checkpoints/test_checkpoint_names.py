from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import pytest

from lora_engine.adapters.published import published_module_shapes
from lora_engine.checkpoints import checkpoint_names, names_by_module, stored_name
from lora_engine.checkpoints.folder import components_of
from lora_engine.checkpoints.leftovers import UNUSED, reason_unused
from lora_engine.checkpoints.names import COMPONENT_LOCATIONS, TensorName, tensor_shapes
from lora_engine.checkpoints.original import open_original
from lora_engine.checkpoints.plan import plan_folder
from lora_engine.checkpoints.recognize import recognize
from lora_engine.errors import SettingsError
from lora_engine.families import published
from lora_engine.formats.ldm_names import LAYOUTS, UnetLayout

# Written by hand, independent of the tables: what each architecture stores, and the number of tensors.
COUNTS = {
    "sd15": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sd2": {"unet": 686, "vae": 248, "text_encoder": 280},
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 389},
}
LANDMARKS = {
    "sd15": {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.10.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.norm.weight": (1280,),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
    },
    "sd2": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.ln_final.bias": (1024,),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.7.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    },
}
# The rules of the original layout, as expressions over whole names.
TRANSFORMER = (
    r"(norm|proj_in|proj_out|transformer_blocks\.\d\.(norm[123]|attn[12]\.(to_q|to_k|to_v|to_out\.0)"
    r"|ff\.net\.(0\.proj|2)))"
)
RESNET = r"(in_layers\.[02]|emb_layers\.1|out_layers\.[03]|skip_connection)"
UNET = re.compile(
    r"model\.diffusion_model\.(time_embed\.[02]|label_emb\.0\.[02]|out\.[02]|input_blocks\.0\.0"
    rf"|input_blocks\.([1-9]|1[01])\.(0\.(op|{RESNET})|1\.{TRANSFORMER})"
    rf"|middle_block\.([02]\.{RESNET}|1\.{TRANSFORMER})"
    rf"|output_blocks\.([0-9]|1[01])\.(0\.{RESNET}|1\.{TRANSFORMER}|[12]\.conv))\.(weight|bias)"
)


def expected(architecture: str, entry: TensorName) -> tuple[int, ...]:
    config = published[architecture].components[entry.component]
    return entry.stored_shape(tensor_shapes(entry.component, config)[entry.name])


@pytest.mark.parametrize("architecture", COUNTS)
def test_every_part_has_as_many_tensors_as_the_published_file(architecture: str) -> None:
    names = checkpoint_names(architecture)
    for component, count in COUNTS[architecture].items():
        assert len({entry.stored for entry in names if entry.component == component}) == count


@pytest.mark.parametrize("architecture", LANDMARKS)
def test_published_names_and_shapes_are_in_the_table(architecture: str) -> None:
    table = {entry.stored: expected(architecture, entry) for entry in checkpoint_names(architecture)}
    assert {name: table.get(name) for name in LANDMARKS[architecture]} == LANDMARKS[architecture]


@pytest.mark.parametrize("architecture", COMPONENT_LOCATIONS)
def test_every_name_of_the_unet_follows_the_original_rules(architecture: str) -> None:
    stored = [entry.stored for entry in checkpoint_names(architecture) if entry.component == "unet"]
    assert [name for name in stored if not UNET.fullmatch(name)] == []
    assert not UNET.fullmatch("model.diffusion_model.down_blocks.0.resnets.0.conv1.weight")


@pytest.mark.parametrize("architecture", COMPONENT_LOCATIONS)
def test_a_stored_tensor_belongs_to_one_tensor_or_to_equal_parts(architecture: str) -> None:
    parts: dict[str, list[tuple[int, int]]] = {}
    for entry in checkpoint_names(architecture):
        parts.setdefault(entry.stored, []).append(entry.part)
    assert all(
        sorted(entries) == [(index, len(entries)) for index in range(len(entries))] for entries in parts.values()
    )
    assert {len(entries) for entries in parts.values()} == ({1} if architecture == "sd15" else {1, 3})


@pytest.mark.parametrize("architecture", COMPONENT_LOCATIONS)
def test_shapes_in_file_and_folder_determine_each_other(architecture: str) -> None:
    for entry in checkpoint_names(architecture):
        config = published[architecture].components[entry.component]
        shape = tensor_shapes(entry.component, config)[entry.name]
        assert entry.folder_shape(entry.stored_shape(shape)) == shape
        first, last = entry.rows(entry.stored_shape(shape)[0])
        assert last - first == (shape[::-1] if entry.change == "transposed" else shape)[0]


@pytest.mark.parametrize("architecture", COMPONENT_LOCATIONS)
def test_every_adaptable_layer_has_its_weight_in_the_table(architecture: str) -> None:
    by_module = names_by_module(checkpoint_names(architecture))
    for module, shape in published_module_shapes(architecture).items():
        entry = by_module[module]["weight"]
        assert entry.folder_shape(expected(architecture, entry)) == shape


@pytest.mark.parametrize("architecture", COMPONENT_LOCATIONS)
def test_the_layout_by_the_settings_is_the_one_that_adapters_are_read_by(architecture: str) -> None:
    entry = published[architecture]
    assert UnetLayout.of(entry.components["unet"].config) == LAYOUTS[entry.family]


@pytest.mark.parametrize("architecture", ["sd15", "sd2", "sdxl"])
def test_untrained_bases_have_the_names_of_the_published_ones(architecture: str, folders: dict[str, Path]) -> None:
    from lora_engine.checkpoints.folder import read_components

    narrow = checkpoint_names(architecture, read_components(folders[architecture]))
    assert set(narrow) == set(checkpoint_names(architecture))


def test_old_and_averaged_tensors_are_found_under_their_own_names() -> None:
    names = names_by_module(checkpoint_names("sd15"))
    entry = names["text_encoder.text_model.final_layer_norm"]["weight"]
    old = "cond_stage_model.transformer.final_layer_norm.weight"
    assert stored_name(entry, {old}) == old
    assert stored_name(entry, {"other"}) is None
    average = "model_ema.diffusion_modelinput_blocks00weight"
    assert stored_name(names["unet.conv_in"]["weight"], {average}, averaged=True) == average
    assert stored_name(names["unet.conv_in"]["weight"], {average}) is None


@pytest.mark.parametrize("architecture", COMPONENT_LOCATIONS)
def test_no_needed_tensor_counts_as_unused(architecture: str) -> None:
    assert [entry.stored for entry in checkpoint_names(architecture) if reason_unused(entry.stored)] == []
    assert all(reason_unused(pattern.replace("*", "x")) for pattern in UNUSED)


def test_an_architecture_without_a_table_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"'gan'.*sd15, sd2, sd2-base, sdxl"):
        checkpoint_names("gan")


@pytest.mark.parametrize("name", published)
def test_published_shapes_need_no_weights_and_leave_the_generator_alone(name: str) -> None:
    import torch

    from lora_engine.adapters.published import empty_module

    before = torch.get_rng_state()
    architecture = published[name]
    for part in architecture.adaptable:
        assert all(value.is_meta for value in empty_module(architecture.components[part]).parameters())
    assert torch.equal(before, torch.get_rng_state())
    components = {module.split(".")[0] for module in published_module_shapes(name)}
    assert components == set(architecture.adaptable)


def test_an_unknown_published_architecture_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean 'sdxl'"):
        published_module_shapes("sdx")


@pytest.mark.parametrize("name", COMPONENT_LOCATIONS)
def test_a_file_of_the_published_shapes_is_recognized_and_planned_whole(name: str, tmp_path: Path) -> None:
    path = sparse_checkpoint(name, tmp_path / "x.safetensors")
    with open_original(path) as original:
        recognized = recognize(original.shapes, {}, str(path))
        assert recognized.architecture == ("sd2" if name == "sd2-base" else name)
        components = components_of(recognized, None)
        plans = plan_folder(original, recognized, components)
    assert plans.keys() == {entry.component for entry in checkpoint_names(name)}
    for component, plan in plans.items():
        assert {entry: tensor.shape for entry, tensor in plan.items()} == tensor_shapes(
            component, components[component]
        )


def sparse_checkpoint(architecture: str, path: Path) -> Path:
    """Writes a sparse original file of the real shapes, all zeros, and returns its path."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for entry in checkpoint_names(architecture):
        if entry.stored not in header:
            shape = expected(architecture, entry)
            end = offset + 2 * math.prod(shape)
            header[entry.stored] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path
