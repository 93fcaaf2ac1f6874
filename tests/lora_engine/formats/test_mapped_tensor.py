"""A mapped tensor gives what the torch tensor with the same values gives, without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_engine.errors import AdapterError
from lora_engine.formats.dtypes import STORED_DTYPES
from lora_engine.formats.mapped_tensor import is_tensor, name_of_dtype
from lora_engine.formats.safetensors_io import map_safetensors, read_safetensors

FLOATS = [name for name in STORED_DTYPES.values() if "float" in name]
WHOLE = [name for name in STORED_DTYPES.values() if "int" in name or name == "bool"]
SPECIAL = [0.0, -0.0, 1.0, -1.5, 2.0**-9, 448.0, -3.0, 0.25]


def pair(tensor, tmp_path):
    """Returns a tensor as it is mapped from a file, and as torch reads it."""
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    return (read(tmp_path / "a.safetensors")[0]["x"] for read in (map_safetensors, read_safetensors))


def same(mapped, tensor):
    assert list(mapped.shape) == list(tensor.shape)
    assert name_of_dtype(mapped) == str(tensor.dtype).removeprefix("torch.")
    assert mapped.as_torch().dtype == tensor.dtype
    torch.testing.assert_close(mapped.as_torch().double(), tensor.double(), rtol=0, atol=0, equal_nan=True)
    return True


def raised(call):
    """Returns the message of an `AdapterError`."""
    with pytest.raises(AdapterError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_of_every_float_dtype_are_those_of_torch(dtype, tmp_path):
    values = torch.tensor(SPECIAL).to(getattr(torch, dtype)).reshape(2, 4)
    mapped, tensor = pair(values, tmp_path)
    assert same(mapped, tensor)
    assert mapped.tolist() == tensor.tolist()
    assert [mapped[0, column].item() for column in range(4)] == [tensor[0, column].item() for column in range(4)]
    assert same(mapped.half(), tensor.half())
    assert same(mapped.double(), tensor.double())
    assert same(mapped.double() * 0.3, tensor.double() * 0.3)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_byte_of_float8_has_torchs_value(dtype, tmp_path):
    mapped, tensor = pair(torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)), tmp_path)
    assert same(mapped.half(), tensor.half())


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_of_either_sign_are_not_counted_as_values(dtype, tmp_path):
    values = torch.tensor([[0.0, -0.0, 1.0], [0.0, -0.0, -0.0]]).to(getattr(torch, dtype))
    mapped, tensor = pair(values, tmp_path)
    wide = tensor.float()  # torch compares no float8
    assert mapped.ne(0).numpy().tolist() == wide.ne(0).tolist()
    assert mapped.any(0).numpy().tolist() == wide.ne(0).any(0).tolist() == [False, False, True]
    assert bool(mapped.any()) is True
    assert bool(mapped[1].any()) is False


@pytest.mark.parametrize("dtype", WHOLE)
def test_numbers_of_every_whole_dtype_are_those_of_torch(dtype, tmp_path):
    mapped, tensor = pair(torch.tensor([[1, 0], [1, 1]]).to(getattr(torch, dtype)), tmp_path)
    assert same(mapped, tensor)
    assert mapped.tolist() == tensor.tolist()
    assert mapped.count_not_finite() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_not_finite_are_counted(dtype, tmp_path):
    bad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 3.0]).to(getattr(torch, dtype))
    mapped, tensor = pair(bad, tmp_path)
    assert mapped.count_not_finite() == int((~tensor.float().isfinite()).sum()) > 0
    assert mapped[:1].count_not_finite() == 0


def test_views_have_the_shapes_and_values_of_torchs(tmp_path):
    mapped, tensor = pair(torch.arange(24.0).reshape(2, 3, 4).bfloat16(), tmp_path)
    index = np.array([1, 0])
    for view in (
        lambda x: x.T if x.dim() == 2 else x[0].T,
        lambda x: x[index],
        lambda x: x[:, 1:],
        lambda x: x[None],
        lambda x: x.flatten(1),
        lambda x: x.flatten(),
        lambda x: x.reshape(4, -1),
        lambda x: x.reshape((4, 6)),
        lambda x: x.transpose(0, 1),
        lambda x: x.unsqueeze(1),
        lambda x: x.clone(),
        lambda x: -x,
        lambda x: x * 2.0,
    ):
        result = view(mapped)
        assert torch.equal(result.as_torch() if hasattr(result, "as_torch") else result, view(tensor))
    assert (mapped.dim(), mapped.numel(), len(mapped)) == (tensor.dim(), tensor.numel(), len(tensor))


def test_a_tensor_without_values_and_a_single_number_are_mapped(tmp_path):
    for tensor in (torch.empty(0, 3), torch.tensor(2.5), torch.empty(3, 0, 2)):
        mapped, original = pair(tensor, tmp_path)
        assert same(mapped, original)
        assert mapped.flatten().tolist() == original.flatten().tolist()
    assert is_tensor(mapped)
    assert is_tensor(original)
    assert not is_tensor([1.0])


def test_functions_and_other_attributes_are_those_of_torch(tmp_path):
    mapped, tensor = pair(torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), tmp_path)
    assert torch.equal(torch.cat([mapped, mapped]), torch.cat([tensor, tensor]))
    assert torch.equal(torch.zeros_like(mapped), torch.zeros_like(tensor))
    assert torch.equal(torch.add(tensor, mapped, alpha=2.0), 3.0 * tensor)
    assert mapped.dtype == torch.float32
    assert mapped.norm() == tensor.norm()
    with pytest.raises(AttributeError, match="no_such_method"):
        mapped.no_such_method()


def test_a_damaged_file_is_refused_alike(tmp_path):
    save_file({"x": torch.ones(4)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    for name, damaged in {"short": content[:-3], "long": content + b"1234", "empty": b""}.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(damaged)
        assert raised(lambda: map_safetensors(path)) == raised(lambda: read_safetensors(path))  # noqa: B023


def test_mapping_imports_no_torch_and_computing_does(tmp_path):
    save_file({"x": torch.ones(4)}, tmp_path / "a.safetensors")
    code = (
        "import sys\n"
        "from lora_engine.formats.safetensors_io import map_safetensors\n"
        "tensor = map_safetensors(sys.argv[1])[0]['x']\n"
        "print(tensor.tolist(), tensor.count_not_finite(), 'torch' in sys.modules)\n"
        "tensor.norm()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.safetensors"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["[1.0, 1.0, 1.0, 1.0] 0 False", "True"], done.stderr
