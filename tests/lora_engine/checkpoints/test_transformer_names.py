"""Original names of transformers are those that diffusers' own converters read, at the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils

from lora_engine.checkpoints.names import tensor_shapes
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.checkpoints.transformer_names import find_transformer, plan_original
from lora_engine.errors import BaseModelError
from lora_engine.families import families, published

CONVERTERS = {
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
}
PUBLISHED = [entry.name for entry in published.values() if "transformer" in entry.components]


def stored(shapes):
    return {name: StoredTensor(Path("model.safetensors"), 0, "F32", shape) for name, shape in shapes.items()}


def original_shapes(architecture):
    entry = published[architecture]
    tensors = stored(tensor_shapes("transformer", entry.components["transformer"]))
    planned = plan_original(families[entry.family], tensors, "")
    return {key: tensor.shape for key, tensor in planned.items()}


def numbered_rows(shape):
    """A matrix of one column, or a vector, with the numbers of the rows; the converters divide rows only."""
    rows = torch.arange(shape[0])
    return rows if len(shape) == 1 else rows.reshape(-1, 1)


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_every_row_of_a_published_transformer_is_where_diffusers_converter_puts_it(architecture):
    entry, shapes = published[architecture], original_shapes(architecture)
    expected = CONVERTERS[entry.family]({key: numbered_rows(shape) for key, shape in shapes.items()})
    found = find_transformer(stored(shapes), "")
    assert (found.family.name, found.others) == (entry.family, ())
    assert {part.name for part in found.tensors} == set(expected)
    for part in found.tensors:
        rows = torch.arange(*part.rows)
        rows = rows.roll(len(rows) // 2) if part.swapped else rows
        assert torch.equal(expected[part.name].flatten(), rows), part.name
    shapes_back = {part.name: part.shape for part in found.tensors}
    assert shapes_back == tensor_shapes("transformer", entry.components["transformer"])


def test_a_fused_layer_with_other_rows_is_refused():
    shapes = original_shapes("flux")
    key = "double_blocks.0.img_attn.qkv.bias"
    with pytest.raises(BaseModelError, match=r"9217 rows.*a multiple of 3"):
        find_transformer(stored(shapes | {key: (9217,)}), "")


def test_a_part_that_several_families_have_is_refused():
    shapes = {name: shape for name, shape in original_shapes("flux").items() if ".img_attn.qkv." in name}
    with pytest.raises(BaseModelError, match=r"may be .*FLUX\.1.*Chroma"):
        find_transformer(stored(shapes), "")
