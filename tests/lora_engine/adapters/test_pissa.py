"""PiSSA starts with the principal part of the weight, and is exported as a LoRA of twice the rank."""

import pytest
import torch
from law_adapters import fresh_delta, tree_of
from torch import nn

from lora_engine.adapters import LoraDelta, PissaDelta, attach, create_adapter
from lora_engine.adapters.pissa import principal_part
from lora_engine.errors import SettingsError


def fresh(layer, rank, alpha=None):
    return fresh_delta(layer, "pissa", rank, alpha)


@pytest.mark.parametrize("layer", [nn.Linear(9, 7), nn.Conv2d(4, 6, 3), nn.Embedding(9, 5)])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_the_start_is_the_best_part_of_the_weight_of_that_rank(layer, alpha):
    delta = fresh(layer, 2, alpha)
    weight = layer.weight.detach().flatten(1)
    initial = LoraDelta(delta.down, delta.up, delta.alpha).delta_weight(weight)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(initial, left[:, :2] * values[:2] @ right[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(delta.up.flatten(1).norm(dim=0), delta.down.flatten(1).norm(dim=1))
    assert torch.count_nonzero(delta.delta_weight(layer.weight)) == 0


def test_the_exported_lora_is_the_same_delta_with_the_same_scale():
    layer = nn.Conv2d(4, 6, 3)
    delta = fresh(layer, 2, 5.0)
    moved = delta.with_factors({**delta.factors(), "up": delta.up + 0.1, "down": delta.down * 1.2})
    exported = moved.to_export()
    assert type(exported) is LoraDelta
    assert (exported.rank, exported.alpha, exported.scale) == (4, 10.0, 2.5)
    weight = layer.weight.detach()
    torch.testing.assert_close(exported.delta_weight(weight), moved.delta_weight(weight), rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(exported.delta_weight(weight))


def test_the_initial_factors_are_not_trained():
    layer = nn.Linear(9, 7)
    tree = tree_of(layer)
    adapter = create_adapter(tree, "*", "pissa", 2)
    with attach(tree, adapter, trainable=True) as attachment:
        assert {name.split(".")[-1] for name, _ in attachment.named_parameters()} == {"down", "up"}


def low_rank_matrix(rows, columns):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, 20, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, 20, generator=generator)).Q
    noise = 1e-3 * torch.randn(rows, columns, generator=generator)
    return left * torch.linspace(20, 1, 20) @ right.T + noise


def test_a_large_matrix_is_decomposed_by_a_sketch_with_little_loss():
    matrix = low_rank_matrix(300, 400)
    left, values, right = principal_part(matrix, 4, torch.Generator().manual_seed(1))
    exact = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values, exact.S[:4], rtol=1e-5, atol=0)
    best = exact.U[:, :4] * exact.S[:4] @ exact.Vh[:4]
    torch.testing.assert_close(left * values @ right, best, rtol=0, atol=1e-4)
    again = principal_part(matrix, 4, torch.Generator().manual_seed(1))
    assert torch.equal(again[0], left), "one generator, one result"
    assert not torch.equal(principal_part(matrix, 4, torch.Generator().manual_seed(2))[0], left)


def test_a_large_matrix_of_a_low_rank_is_padded_with_zeros():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 2, generator=generator) @ torch.randn(2, 400, generator=generator)
    left, values, right = principal_part(matrix, 4, generator)
    assert (left.shape, values.shape, right.shape) == ((300, 4), (4,), (4, 400))
    assert values[1] > 1
    assert torch.all(values[2:] < 1e-3 * values[1])
    torch.testing.assert_close(left * values @ right, matrix, rtol=0, atol=1e-3)


def test_issues_are_found():
    delta = fresh(nn.Linear(9, 7), 2)
    assert list(delta.issues((7, 9))) == []
    cut = PissaDelta(delta.down, delta.up, delta.down_start[:1], delta.up_start[:, :1], 2.0)
    assert [issue.factor for issue in cut.issues()] == ["down_start"]
    assert {issue.factor for issue in delta.issues((8, 9))} == {"up", "up_start"}
    with pytest.raises(SettingsError, match="has no rank"):
        fresh(nn.LayerNorm(6), 1)
