"""Laws for every registered merge method, and for the exact linear combination."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_adapters import NAMES, SDXL_NAMES, adapters, random_delta
from pydantic import ValidationError

from lora_engine.adapters import Adapter, kinds
from lora_engine.errors import EngineError, SettingsError
from lora_engine.merging.concatenate import concatenate
from lora_engine.merging.merge import merge_adapters
from lora_engine.merging.methods import METHODS, Combination, Elementwise
from lora_engine.merging.resize import to_lora

few = settings(max_examples=20)
fewer = settings(max_examples=8)
NAME = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "unet.down_blocks.0.resnets.0.conv1"
NEEDED = {"svd": {"energy": 1.0}}
DRAWING = sorted(name for name, method in METHODS.items() if isinstance(method, Elementwise) and method.draws)


def options_of(name, **more):
    """Returns options with which the method drops nothing."""
    fields = METHODS[name].spec.model_fields
    fused_forward = {key: value for key, value in {"density": 1.0, "window": 0.0}.items() if key in fields}
    return METHODS[name].spec(**{**fused_forward, **NEEDED.get(name, {}), **more})


def dense(adapter, name):
    return adapter.modules[name].delta_weight(torch.zeros(SDXL_NAMES[name], dtype=torch.float64))


def close(result, expected, tolerance=1e-5):
    return float((result - expected).norm()) <= tolerance * float(expected.norm())


def random_adapter(seed, names=(NAME, OTHER), rank=3):
    """Returns a random adapter; adapters of different seeds share a common part, like those of one task."""
    modules = {}
    for index, name in enumerate(names):
        common, specific = (random_delta("lora", NAMES[name], rank, 2.0, number + index) for number in (1000, seed))
        modules[name] = specific.with_factors({k: f + 0.5 * specific.factors()[k] for k, f in common.factors().items()})
    return Adapter(modules, "sd")


def copies(name, adapter):
    """Returns the minimum number of copies that the method needs, with weights that sum to 1."""
    count = METHODS[name].adapters or 1
    return [adapter] * count, [1.0 / count] * count


EXACT = sorted(
    name
    for name, method in METHODS.items()
    if isinstance(method, Combination) and method.adapters is None and name != "svd"
)


def test_the_options_of_every_method_name_it():
    assert [method.spec(**NEEDED.get(name, {})).name for name, method in METHODS.items()] == list(METHODS)
    assert all(method.title and not method.title.endswith(".") for method in METHODS.values())


@pytest.mark.parametrize("name", METHODS)
@fewer
@given(adapter=adapters("lora"))
def test_a_merge_of_one_adapter_is_the_adapter(name, adapter):
    merged, report = merge_adapters(*copies(name, adapter), options_of(name))
    assert set(merged.modules) == set(adapter.modules)
    assert report.retained >= 1 - 1e-9
    for module in adapter.modules:
        assert close(dense(merged, module), dense(adapter, module))


@pytest.mark.parametrize("name", EXACT)
def test_a_merge_of_one_adapter_is_exact_where_nothing_is_dense(name):
    adapter = random_adapter(0)
    assert merge_adapters([adapter], [1.0], options_of(name))[0] == adapter


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_the_adapters_changes_no_bit(name):
    method, options = METHODS[name], METHODS[name].spec(**({"rank": 2} if name == "svd" else {}))
    count = method.adapters or 3
    # The last one lacks a module.
    parts = [*(random_adapter(10 * seed) for seed in range(count - 1)), random_adapter(99, names=(OTHER,))]
    pairs = list(zip(parts, (0.7, 0.3, 1.1), strict=False))
    merged = [
        merge_adapters([part for part, _ in order], [weight for _, weight in order], options, seed=5)[0]
        for order in itertools.permutations(pairs)
    ]
    assert all(one == merged[0] for one in merged)


@pytest.mark.parametrize("name", METHODS)
def test_one_seed_gives_one_result_and_a_module_depends_on_no_other(name):
    options = METHODS[name].spec(**({"rank": 2} if name == "svd" else {}))
    parts, weights = [random_adapter(0), random_adapter(10)], [0.6, 0.4]
    merged, _ = merge_adapters(parts, weights, options, seed=5)
    again, _ = merge_adapters(parts, weights, options, seed=5)
    assert merged == again
    alone = [Adapter({OTHER: part.modules[OTHER]}, "sd") for part in parts]
    single, _ = merge_adapters(alone, weights, options, seed=5)
    assert single == Adapter({OTHER: merged.modules[OTHER]}, "sd")


@pytest.mark.parametrize("name", DRAWING)
def test_another_seed_drops_other_elements(name):
    parts = [random_adapter(0), random_adapter(10)]
    first, second = (
        merge_adapters(parts, [1.0, 1.0], METHODS[name].spec(kind="full"), seed=seed)[0] for seed in (1, 2)
    )
    assert not torch.equal(dense(first, OTHER), dense(second, OTHER))


@pytest.mark.parametrize("name", DRAWING)
def test_dropped_elements_do_not_depend_on_the_other_adapters(name):
    one, two = random_adapter(0), random_adapter(10)
    options = METHODS[name].spec(kind="full")
    alone = dense(merge_adapters([one], [1.0], options, seed=3)[0], OTHER)
    other = dense(merge_adapters([two], [1.0], options, seed=3)[0], OTHER)
    both = dense(merge_adapters([one, two], [1.0, 1.0], options, seed=3)[0], OTHER)
    if name == "dare":
        torch.testing.assert_close(both, alone + other)
    else:
        assert torch.equal(both == 0, (alone == 0) & (other == 0))
    assert 0 < int((alone == 0).sum()) < alone.numel()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("factor", [2.0, 0.25])
def test_weights_scale_the_merge_or_are_normalized(name, factor):
    parts, options = [random_adapter(0), random_adapter(10)], METHODS[name].spec(**NEEDED.get(name, {}))
    options = options if name in ("svd", "concatenate") else options.model_copy(update={"kind": "full"})
    merged, _ = merge_adapters(parts, [0.8, 0.4], options, seed=1)
    scaled, _ = merge_adapters(parts, [0.8 * factor, 0.4 * factor], options, seed=1)
    expected = 1.0 if METHODS[name].normalizes else factor
    assert merged.modules
    for module in merged.modules:
        assert close(dense(scaled, module), expected * dense(merged, module), 1e-4)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(DRAWING)))
def test_a_merge_of_scaled_adapters_is_the_scaled_merge(name):
    parts, options = [random_adapter(0), random_adapter(10)], METHODS[name].spec(**NEEDED.get(name, {}))
    merged, _ = merge_adapters(parts, [0.8, 0.4], options)
    louder = [concatenate([part], [3.0]) for part in parts]
    scaled, _ = merge_adapters(louder, [0.8, 0.4], options)
    assert merged.modules
    for module in merged.modules:
        assert close(dense(scaled, module), 3.0 * dense(merged, module), 1e-4)


NONSENSE = {
    "density": 0.0,
    "window": 1.5,
    "scale": float("nan"),
    "rank": 0,
    "energy": 0.0,
    "error": 1.0,
    "tolerance": 0,
    "iterations": 0,
}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in METHODS for field in NONSENSE if field in METHODS[name].spec.model_fields],
)
def test_invalid_options_are_refused(name, field):
    with pytest.raises(ValidationError, match=field):
        METHODS[name].spec(**{**NEEDED.get(name, {}), field: NONSENSE[field]})


@pytest.mark.parametrize("kind", kinds)
def test_the_kinds_that_need_the_bases_values_are_known(kind):
    shape = (6, 4)
    delta = random_delta(kind, shape).to_export()
    bases = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    one, two = (delta.delta_weight(base) for base in bases)
    assert delta.reads_base == (not torch.equal(one, two))


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"concatenate"}))
def test_methods_merge_across_kinds(name, kind):
    layer = torch.nn.Linear(8, 8)
    weight = layer.weight.detach()
    first = random_delta(kind, (8, 8), 2, 2.0, seed=1).to_export()
    second = to_lora(first, weight, rank=3)[0]
    parts = [Adapter({"unet.layer": first}), Adapter({"unet.layer": second})]
    stored = {} if name == "svd" else {"kind": "full"}
    if first.reads_base:
        with pytest.raises(EngineError, match=f"unet.layer: the delta of an adapter of kind '{kind}'.*base's weight"):
            merge_adapters(parts, [0.5, 0.5], options_of(name, **stored))
    base = {"unet": torch.nn.ModuleDict({"layer": layer})}
    merged, _ = merge_adapters(parts, [0.5, 0.5], options_of(name, **stored), base=base)
    result, sums = merged.modules["unet.layer"].delta_weight(weight), [d.delta_weight(weight) for d in (first, second)]
    assert bool(torch.isfinite(result).all())
    assert bool(result.any())
    if name in ("linear", "interpolate", "svd", "dare", "magnitude-prune", "learned"):
        assert close(result, 0.5 * sum(sums), 1e-4)


@few
@given(adapters("lora"))
def test_merging_one_adapter_with_weight_1_is_the_adapter(adapter):
    assert concatenate([adapter], [1.0]) == adapter


@few
@given(st.lists(adapters("lora"), min_size=1, max_size=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_merged_delta_is_the_weighted_sum_of_the_deltas(parts, weights):
    parts = [Adapter(part.modules, "sdxl") for part in parts]
    weights = weights[: len(parts)]
    merged = concatenate(parts, weights)
    assert set(merged.modules) == set().union(*(part.modules for part in parts))
    for name in merged.modules:
        terms = [w * dense(part, name) for part, w in zip(parts, weights, strict=True) if name in part.modules]
        size = max(float(term.abs().max()) for term in terms)
        torch.testing.assert_close(dense(merged, name), sum(terms), rtol=1e-5, atol=1e-5 * max(size, 1e-30))


@few
@given(st.lists(adapters("lora"), min_size=2, max_size=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_order_of_the_adapters_does_not_matter(parts, weights):
    parts = [Adapter(part.modules, "sdxl") for part in parts]
    pairs = list(zip(parts, weights, strict=False))
    merged = [concatenate([p for p, _ in order], [w for _, w in order]) for order in itertools.permutations(pairs)]
    assert all(one == merged[0] for one in merged)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 0.5], [2.0, -1.0]])
@few
@given(data=st.data())
def test_weights_are_linear_in_the_merge(weights, data):
    one = data.draw(adapters("lora"))
    merged = concatenate([one, one], weights)
    for name in one.modules:
        expected = sum(weights) * dense(one, name)
        torch.testing.assert_close(dense(merged, name), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_names_cover_both_families():
    assert set(NAMES) < set(SDXL_NAMES)


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match="did you mean 'ties'"):
        METHODS["tiess"]
