"""Extraction recovers exactly the difference that was added to a model."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_engine.adapters.full import FullDelta
from lora_engine.decomposition import sketched_svd, whole_svd
from lora_engine.errors import AdapterError, BaseModelError, SettingsError
from lora_engine.formats import write_adapter
from lora_engine.merging.budget import Budget
from lora_engine.merging.spectrum import Noise, leading_part
from lora_engine.streaming import fuse
from lora_engine.streaming.extract import extract
from lora_engine.streaming.noise import rounding_variance

SHAPES = {
    "down_blocks.0.attn.to_q": (96, 160),
    "down_blocks.0.attn.to_k": (64, 200),
    "down_blocks.0.conv": (48, 40, 3, 3),
    "down_blocks.0.proj_in": (72, 64, 1, 1),
}
RANK = 3


def low_rank(shape, rank, seed, size):
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1:].numel(), generator=draw)
    return size * matrix.reshape(shape)


def pair(folder, dtype=torch.float32, rank=RANK, size=0.1):
    """Writes a base and a tuned U-Net, which differ in every layer by a known rank, and in norm and bias."""
    draw = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        weight = (torch.randn(shape, generator=draw) * 0.3).to(dtype)
        base[f"{name}.weight"] = weight
        tuned[f"{name}.weight"] = (weight.float() + low_rank(weight.shape, rank, index, size)).to(dtype)
        base[f"{name}.bias"] = torch.zeros(shape[0], dtype=dtype)
        tuned[f"{name}.bias"] = torch.full((shape[0],), 0.5, dtype=dtype)
    base |= {
        "down_blocks.0.norm.weight": torch.ones(6, dtype=dtype),
        "down_blocks.0.norm.bias": torch.ones(6, dtype=dtype),
    }
    tuned |= {
        "down_blocks.0.norm.weight": torch.arange(6).to(dtype),
        "down_blocks.0.norm.bias": base["down_blocks.0.norm.bias"],
    }
    folder.mkdir(exist_ok=True)
    for name, tensors in (("tuned", tuned), ("base", base)):
        save_file(tensors, folder / f"{name}.safetensors")
    return folder / "tuned.safetensors", folder / "base.safetensors"


def difference(tuned, base, name):
    one, other = load_file(tuned), load_file(base)
    return one[f"{name}.weight"].float() - other[f"{name}.weight"].float()


def error(delta, true):
    return float((delta.delta_weight(true) - true).norm() / true.norm())


def test_a_known_difference_is_recovered_exactly(tmp_path):
    tuned, base = pair(tmp_path)
    adapter, report = extract(tuned, base, rank=RANK)
    assert set(adapter.modules) == {f"unet.{name}" for name in SHAPES}
    for name, shape in SHAPES.items():
        delta = adapter.modules[f"unet.{name}"]
        assert (delta.rank, delta.alpha) == (RANK, RANK)
        assert delta.down.dim() == len(shape)
        assert error(delta, difference(tuned, base, name)) < 1e-6
        assert report.modules[f"unet.{name}"].error < 1e-6
        torch.testing.assert_close(
            delta.down.flatten(1).norm(dim=1), delta.up.flatten(1).norm(dim=0), rtol=1e-4, atol=0
        )
    assert report.error < 1e-6
    named = {f"unet.{name}.bias" for name in SHAPES} | {"unet.down_blocks.0.norm.weight"}
    assert set(report.left_out) == named


@pytest.mark.parametrize(
    "choice", [{"energy": 0.9999999}, {"frobenius": 1e-3}, {"rank": 20}, {"rank": 20, "energy": 0.99999}]
)
def test_every_criterion_finds_the_true_rank(choice, tmp_path):
    tuned, base = pair(tmp_path)
    adapter, report = extract(tuned, base, noise_aware=choice == {"rank": 20}, **choice)
    assert {delta.rank for delta in adapter.modules.values()} == {RANK}
    assert report.error <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", [{}, {"rank": 32}])
def test_the_rounding_of_a_half_precision_model_adds_no_rank(dtype, choice, tmp_path):
    tuned, base = pair(tmp_path, dtype)
    adapter, _ = extract(tuned, base, noise_aware=True, **choice)
    assert {name: delta.rank for name, delta in adapter.modules.items()} == {f"unet.{name}": RANK for name in SHAPES}
    fixed, _ = extract(tuned, base, rank=32)  # without it, noise fills whatever rank there is
    assert {delta.rank for delta in fixed.modules.values()} == {32}


def test_modules_that_only_differ_by_rounding_are_left_out(tmp_path):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(120, 90, generator=draw)
    save_file(
        {"down_blocks.0.a.weight": weight, "down_blocks.0.b.weight": weight.clone()}, tmp_path / "base.safetensors"
    )
    tuned = {
        "down_blocks.0.a.weight": weight.bfloat16(),
        "down_blocks.0.b.weight": weight + low_rank(weight.shape, 2, 1, 0.1),
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    adapter, report = extract(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", noise_aware=True)
    assert list(adapter.modules) == ["unet.down_blocks.0.b"]
    assert report.modules["unet.down_blocks.0.a"].rank == 0
    with pytest.raises(AdapterError, match="differ in no module by more than rounding"):
        extract(tmp_path / "base.safetensors", tmp_path / "base.safetensors", rank=4)


@pytest.mark.parametrize("shape", [(400, 500), (64, 800)])
def test_the_noise_is_measured_from_the_weights(shape):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw)  # rows are not of one size
    for dtype in (torch.bfloat16, torch.float16):
        rounding = weight.to(dtype).float() - weight
        variance = rounding_variance(weight.to(dtype))
        noise = Noise.of(variance)
        assert noise.energy == pytest.approx(float(rounding.square().sum()), rel=0.03)
        assert 0.75 * noise.edge < float(torch.linalg.matrix_norm(rounding, 2)) < noise.edge


def test_equal_noise_has_the_edge_of_marchenko_and_pastur():
    noise = Noise.of(torch.full((40, 90), 0.25))
    assert noise.edge == pytest.approx(0.5 * (40**0.5 + 90**0.5))
    assert noise.energy == pytest.approx(900.0)


def test_convolutions_are_truncated_like_their_dense_matrix(tmp_path):
    tuned, base = pair(tmp_path, rank=30)
    adapter, report = extract(tuned, base, rank=8)
    for name in SHAPES:
        true = difference(tuned, base, name)
        values = torch.linalg.svdvals(true.flatten(1).double())
        best = float(values[8:].norm() / values.norm())
        assert error(adapter.modules[f"unet.{name}"], true) == pytest.approx(best, rel=2e-3)
        assert report.modules[f"unet.{name}"].error == pytest.approx(best, rel=2e-3)


def test_norms_and_biases_are_extracted_on_request(tmp_path):
    tuned, base = pair(tmp_path)
    adapter, report = extract(tuned, base, rank=RANK, with_rest=True)
    assert isinstance(adapter.modules["unet.down_blocks.0.norm"], FullDelta)
    assert report.left_out == []
    write_adapter(tmp_path / "a.safetensors", adapter)
    fuse(base, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "out.safetensors")
    result, expected = load_file(tmp_path / "out.safetensors"), load_file(tuned)
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_kind_full_extracts_the_dense_difference(tmp_path):
    tuned, base = pair(tmp_path)
    adapter, report = extract(tuned, base, kind="full")
    for name in SHAPES:
        assert torch.equal(adapter.modules[f"unet.{name}"].diff, difference(tuned, base, name))
    assert report.error == 0.0


def test_targets_select_modules(tmp_path):
    tuned, base = pair(tmp_path)
    adapter, report = extract(tuned, base, rank=2, targets="*.to_?")
    assert list(adapter.modules) == ["unet.down_blocks.0.attn.to_k", "unet.down_blocks.0.attn.to_q"]
    assert "unet.down_blocks.0.conv.weight" in report.left_out
    with pytest.raises(SettingsError, match="matches no module"):
        extract(tuned, base, rank=2, targets="*.nowhere")


def test_the_same_seed_gives_the_same_factors_whatever_else_is_extracted(tmp_path):
    tuned, base = pair(tmp_path, torch.bfloat16)
    whole, _ = extract(tuned, base, rank=8, seed=3)
    alone, _ = extract(tuned, base, rank=8, seed=3, targets="*.to_q")
    name = "unet.down_blocks.0.attn.to_q"
    assert torch.equal(whole.modules[name].down, alone.modules[name].down)
    assert extract(tuned, base, rank=8, seed=3)[0] == whole


def test_models_that_do_not_match_are_refused_before_work_starts(tmp_path):
    tuned, base = pair(tmp_path)
    tensors = load_file(base)
    wider = tensors | {"down_blocks.0.conv.weight": torch.ones(48, 41, 3, 3)}
    lacking = {name: tensor for name, tensor in tensors.items() if not name.startswith("down_blocks.0.conv")}
    calls = []
    cases = (wider, r"\[48, 40, 3, 3\] in one and \[48, 41, 3, 3\]"), (lacking, "2 tensors differ in name or shape")
    for other, problem in cases:
        save_file(other, tmp_path / "other.safetensors")
        with pytest.raises(BaseModelError, match=problem):
            extract(tuned, tmp_path / "other.safetensors", rank=2, progress=lambda *call: calls.append(call))
    assert calls == []
    extract(tuned, base, rank=2, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(done, 4) for done in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({}, "no criterion for the rank"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"rank": 2, "kind": "dora"}, "'dora'"),
    ],
)
def test_settings_without_a_criterion_are_refused(choice, problem, tmp_path):
    tuned, base = pair(tmp_path)
    with pytest.raises(SettingsError, match=problem):
        extract(tuned, base, **choice)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tuned, base = pair(tmp_path)
    tensors = load_file(tuned)
    tensors["down_blocks.0.conv.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, tuned)
    with pytest.raises(AdapterError, match="the difference is not finite"):
        extract(tuned, base, rank=2)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300), (700, 150)])
def test_a_sketch_is_as_accurate_as_the_full_svd_on_pure_noise(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    best = float(torch.linalg.svdvals(matrix)[16:].norm())
    for triplets in (sketched_svd(matrix, 16, generator=torch.Generator().manual_seed(1)), whole_svd(matrix)):
        left, values, right = (part[..., :16] if index < 2 else part[:16] for index, part in enumerate(triplets))
        assert float((matrix - (left * values) @ right).norm()) <= 1.002 * best
        torch.testing.assert_close(left.T @ left, torch.eye(16), rtol=0, atol=1e-5)
        torch.testing.assert_close(right @ right.T, torch.eye(16), rtol=0, atol=1e-5)


def test_a_steep_spectrum_keeps_its_small_values():
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 24, generator=draw)).Q for size in (200, 300))
    values = 10.0 ** -torch.arange(0, 6, 0.25)
    part = leading_part((left * values) @ right.T, Budget(rank=20), generator=draw)
    torch.testing.assert_close(part.values, values[:20], rtol=2e-2, atol=0)


def test_a_matrix_of_zeros_has_no_rank():
    part = leading_part(torch.zeros(8, 9), Budget(rank=4), generator=torch.Generator())
    assert (part.rank, part.error) == (0, 0.0)
