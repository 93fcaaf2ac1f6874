"""Adapters on the rows of a batch: equal to single rows, exact padding, the base as it was, refusals."""

from __future__ import annotations

import pytest
import torch
from law_adapters import LAYERS, MATRICES, applies_to, input_of, layer_of, moved_delta
from torch import nn

from lora_engine.adapters import Adapter, attach
from lora_engine.adapters.row_factors import RowAdapter, RowFactors, find_row_obstacle
from lora_engine.adapters.rows import ArrangementError, RowAdapters
from lora_engine.catalog.kinds import KINDS
from lora_engine.errors import AdapterError

NAME = "unet.0"
WITH_ROWS = {"lora", "rslora", "lora-fa", "pissa"}
LINEAR = [name for name in MATRICES if name not in {"embedding", "conv grouped"}]
PAIRS = [
    (name, layer) for name, kind in KINDS.items() if kind.spec for layer in LAYERS if applies_to(name, layer_of(layer))
]


def batch_of(layer, rows):
    x = input_of(layer)
    generator = torch.Generator().manual_seed(9)
    return torch.randn(rows, *x.shape[1:], generator=generator)


def single_rows(network, x, rows):
    """Returns the outputs of each group of rows with its adapters attached."""
    parts, first = [], 0
    for count, adapters in rows:
        attached = [attach({"unet": network}, adapter, multiplier) for adapter, multiplier in adapters]
        parts.append(network(x[first : first + count]))
        for attachment in reversed(attached):
            attachment.detach()
        first += count
    return torch.cat(parts)


def placed(network, rows):
    made = {}
    for _, adapters in rows:
        for adapter, multiplier in adapters:
            if (id(adapter), multiplier) not in made:
                row = RowAdapter(RowFactors.of({"unet": network}, adapter))
                row.set_multipliers(lambda name, multiplier=multiplier: multiplier)
                made[id(adapter), multiplier] = row
    return [(count, [made[id(adapter), multiplier] for adapter, multiplier in own]) for count, own in rows]


def close(first, second):
    assert (first - second).abs().max() <= 5e-6 * second.abs().max()


@pytest.mark.parametrize("layer", LINEAR)
@pytest.mark.parametrize("kind", sorted(WITH_ROWS))
@torch.no_grad()
def test_rows_with_different_adapters_and_ranks_equal_single_rows(layer, kind):
    network = nn.Sequential(layer_of(layer))
    first, second, third = (Adapter({NAME: moved_delta(network[0], kind, rank, seed=rank)}) for rank in (1, 2, 3))
    rows = [(2, [(first, 0.7)]), (1, []), (2, [(second, -0.4), (third, 1.5)]), (1, [(third, 0.0)])]
    x = batch_of(network[0], 6)
    expected, plain = single_rows(network, x, rows), network(x)
    with RowAdapters({"unet": network}) as adapters:
        adapters.set_rows(placed(network, rows))
        out = network(x)
    close(out, expected)
    assert torch.equal(out[2], plain[2])
    assert torch.equal(out[5], plain[5])
    assert (out[0] - plain[0]).abs().max() > 1e-3


@torch.no_grad()
def test_rows_of_a_convolution_in_tucker_form_equal_single_rows():
    network = nn.Sequential(layer_of("conv 3x3"))
    adapter = Adapter({NAME: moved_delta(network[0], "lora", 3, tucker=True)})
    assert adapter.modules[NAME].mid is not None
    x, rows = batch_of(network[0], 3), [(2, [(adapter, 0.7)]), (1, [])]
    expected = single_rows(network, x, rows)
    with RowAdapters({"unet": network}) as adapters:
        adapters.set_rows(placed(network, rows))
        close(network(x), expected)


@pytest.mark.parametrize(("kind", "layer"), PAIRS)
@torch.no_grad()
def test_every_kind_on_every_layer_equals_single_rows_or_is_refused(kind, layer):
    network = nn.Sequential(layer_of(layer))
    adapter = Adapter({NAME: moved_delta(network[0], kind)})
    obstacle = find_row_obstacle({"unet": network}, adapter)
    assert (obstacle is None) == (kind in WITH_ROWS and layer in LINEAR)
    if obstacle is not None:
        assert NAME in obstacle
        with pytest.raises(AdapterError, match="products by row"):
            RowFactors.of({"unet": network}, adapter)


def test_the_pairs_have_every_kind_that_is_created():
    assert {kind for kind, _ in PAIRS} == {name for name, kind in KINDS.items() if kind.spec}
    assert len(PAIRS) > 100


@torch.no_grad()
def test_weights_can_change_between_predictions_and_equal_ones_copy_nothing():
    network = nn.Sequential(layer_of("linear"))
    adapter = Adapter({NAME: moved_delta(network[0], "lora")})
    x, row = batch_of(network[0], 2), RowAdapter(RowFactors.of({"unet": network}, adapter))
    with RowAdapters({"unet": network}) as adapters:
        adapters.set_rows([(2, [row])])
        for multiplier in (0.3, 0.0, -1.2):
            row.set_multipliers(lambda name, multiplier=multiplier: multiplier)
            adapters.set_rows([(2, [row])])
            out, version = network(x), network[0].up._version
            adapters.set_rows([(2, [row])])
            assert network[0].up._version == version
            adapters.suspend()
            close(out, single_rows(network, x, [(2, [(adapter, multiplier)])]))
            adapters.resume()


def test_the_base_is_as_it_was_and_an_attached_adapter_is_refused():
    network = nn.Sequential(layer_of("linear"))
    layer, weight = network[0], network[0].weight.clone()
    adapter = Adapter({NAME: moved_delta(layer, "lora")})
    row = RowAdapter(RowFactors.of({"unet": network}, adapter))
    with RowAdapters({"unet": network}) as adapters:
        adapters.set_rows([(2, [row])])
        assert network[0] is not layer
        assert network[0].in_features == layer.in_features
    assert network[0] is layer
    assert torch.equal(layer.weight, weight)
    with (
        attach({"unet": network}, adapter),
        RowAdapters({"unet": network}) as adapters,
        pytest.raises(AdapterError, match="an adapter is attached"),
    ):
        adapters.set_rows([(2, [row])])


@torch.no_grad()
def test_rows_that_a_layer_gets_in_another_arrangement_are_refused():
    network = nn.Sequential(layer_of("linear"))
    row = RowAdapter(RowFactors.of({"unet": network}, Adapter({NAME: moved_delta(network[0], "lora")})))
    x = batch_of(network[0], 2)
    with RowAdapters({"unet": network}) as adapters:
        adapters.set_rows([(1, [row]), (1, [])])
        with pytest.raises(ArrangementError, match="computes 14 rows, and the batch has 2"):
            network(x.flatten(0, 1))
        adapters.set_rows([(2, [row])])  # one adapter for all rows, in whatever arrangement
        assert torch.equal(network(x.flatten(0, 1)).view(2, 7, -1), network(x))


@torch.no_grad()
def test_fixed_modules_and_ranks_keep_their_shapes_and_refuse_others():
    network = nn.Sequential(layer_of("linear"), nn.Linear(8, 8))
    first, second = (Adapter({NAME: moved_delta(network[0], "lora", rank, seed=rank)}) for rank in (1, 3))
    rows = [(1, [(first, 0.5)]), (1, [(second, 0.5)])]
    x = batch_of(network[0], 2)
    expected, plain = single_rows(network, x, rows), network(x)
    made = placed(network, rows)
    with RowAdapters({"unet": network}, modules=[NAME], rank=3) as adapters:
        adapters.set_rows([(1, []), (1, [])])
        down = network[0].down
        assert torch.equal(network(x), plain)
        adapters.set_rows(made)
        assert network[0].down is down
        close(network(x), expected)
        with pytest.raises(AdapterError, match="rank 4 together"):
            adapters.set_rows([(1, [*made[0][1], *made[1][1]]), (1, [])])
        close(network(x), expected)
        with pytest.raises(AdapterError, match=r"unet\.1"):
            adapters.set_rows([(2, [RowAdapter(RowFactors({"unet.1": (torch.ones(1, 8), torch.ones(1, 8))}))])])
        adapters.set_rows([(2, [])])
        assert torch.equal(network(x), plain)
