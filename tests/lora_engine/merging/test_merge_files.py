"""Weights by pattern, merged files with their cards, and weights that are learned."""

import pytest
import torch
from law_adapters import NAMES, random_delta
from torch import nn

from lora_engine.adapters import Adapter, attach, create_adapter
from lora_engine.bases.base import load_base
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.pixels import write_png
from lora_engine.errors import AdapterError, NonFiniteError, SettingsError
from lora_engine.formats import Card, read_adapter, write_adapter
from lora_engine.merging.files import merge_files
from lora_engine.merging.learned import denoising_losses, learn_weights
from lora_engine.merging.merge import merge_adapters
from lora_engine.merging.methods import parse_options
from lora_engine.merging.methods.geometric_median import geometric_median
from lora_engine.merging.methods.learned import Learned
from lora_engine.merging.methods.model_stock import model_stock
from lora_engine.merging.methods.slerp import slerp
from lora_engine.merging.weights import BLOCK_LISTS, block_weights, weights_by_module

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.5, {QUERY: 0.5, CONV: 0.5, TEXT: 0.5}),
        ({"text_encoder": 0.2}, {QUERY: 1.0, CONV: 1.0, TEXT: 0.2}),
        ({"*": 0.0, "unet.down": 0.3}, {QUERY: 0.3, CONV: 0.3, TEXT: 0.0}),
        ({"unet": 0.1, "unet.down.0": 0.3, "unet.down_blocks.0.resnets": 0.7}, {QUERY: 0.3, CONV: 0.7, TEXT: 1.0}),
        ({"unet.*.to_q": 0.4, "unet.up": 2.0}, {QUERY: 0.4, CONV: 1.0, TEXT: 1.0}),
        ({"BASE": 0.0, "IN01": 0.6, "M00": 3.0}, {QUERY: 0.6, CONV: 0.6, TEXT: 0.0}),
        ({"IN01": 0.6, QUERY: 0.9}, {QUERY: 0.9, CONV: 0.6, TEXT: 1.0}),
    ],
)
def test_the_most_specific_pattern_wins(weight, expected):
    assert weights_by_module(weight, [QUERY, CONV, TEXT]) == expected


def test_a_component_does_not_match_its_neighbor():
    names = ["text_encoder.a", "text_encoder_2.a"]
    assert weights_by_module({"text_encoder": 0.5}, names) == {"text_encoder.a": 0.5, "text_encoder_2.a": 1.0}


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        ({"unet.left_blocks": 0.5}, "'unet.left_blocks' matches none of the adapter's 1 modules"),
        ({"*.to_q": 0.5, "u*to_q": 0.1}, "give 0.5, 0.1"),
        (float("nan"), "weight nan"),
        ({"unet": float("inf")}, "weight inf"),
    ],
)
def test_idle_and_ambiguous_weights_are_refused(weight, problem):
    with pytest.raises(SettingsError, match=problem):
        weights_by_module(weight, [QUERY if "left" in str(weight) else "unet.to_q"])


@pytest.mark.parametrize(("length", "families"), [(12, "XL"), (17, "SD"), (20, "XL"), (26, "SD")])
def test_block_lists_have_their_slots(length, families):
    slots = BLOCK_LISTS[length]
    assert len(slots) == len(set(slots)) == length
    assert slots[-1] == {"SD": "OUT11", "XL": {12: "OUT05", 20: "OUT08"}.get(length)}[families]
    assert block_weights([0.5] * length) == dict.fromkeys(slots, 0.5)


# From the numbering of the two U-Nets' blocks in Stability's own code.
@pytest.mark.parametrize(
    ("slot", "name"),
    [
        ("IN00", "unet.conv_in"),
        ("IN01", "unet.down_blocks.0.attentions.0.proj_in"),
        ("IN03", "unet.down_blocks.0.downsamplers.0.conv"),
        ("IN08", "unet.down_blocks.2.attentions.1.proj_in"),
        ("M00", "unet.mid_block.attentions.0.proj_in"),
        ("OUT02", "unet.up_blocks.0.upsamplers.0.conv"),
        ("OUT05", "unet.up_blocks.1.attentions.2.proj_in"),
        ("OUT11", "unet.up_blocks.3.attentions.2.proj_in"),
        ("BASE", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
    ],
)
def test_slots_match_their_blocks(slot, name):
    assert weights_by_module({slot: 0.25}, [name, "unet.conv_out"]) == {name: 0.25, "unet.conv_out": 1.0}


def test_block_lists_of_another_length_are_refused():
    with pytest.raises(SettingsError, match="13 block weights"):
        block_weights([1.0] * 13)


def test_slerp_interpolates_directions_on_the_arc_and_norms_linearly():
    gram = torch.tensor([[1.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    first, second = slerp([1.0, 1.0], lambda: gram)
    # Half of the right angle, with norm 2.
    assert (first, second * 3) == pytest.approx((2**0.5, 2**0.5))
    with pytest.raises(SettingsError, match=r"-1\.0"):
        slerp([1.0, -1.0], lambda: gram)


@pytest.mark.parametrize("other", [2.0, -1.0, 0.0])
def test_slerp_of_parallel_deltas_is_the_line(other):
    gram = torch.tensor([[1.0, other], [other, other**2]], dtype=torch.float64)
    assert slerp([0.75, 0.25], lambda: gram) == [0.75, 0.25]


@pytest.mark.parametrize(("cosine", "drawn"), [(1.0, 1.0), (0.5, 2 / 3), (0.0, 0.0), (-0.5, 0.0)])
def test_model_stock_of_two_scales_the_mean_by_their_angle(cosine, drawn):
    gram = torch.tensor([[4.0, 4 * cosine], [4 * cosine, 4.0]], dtype=torch.float64)
    assert model_stock([1.0, 1.0], lambda: gram) == pytest.approx([drawn / 2, drawn / 2])


def test_the_geometric_median_is_a_minimum_and_robust_to_outliers():
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(5, 8, generator=draw, dtype=torch.float64)
    points[4] *= 100

    def median(chosen):
        shares = geometric_median([1.0] * 5, lambda: chosen @ chosen.T, tolerance=1e-14, iterations=2000)
        return torch.tensor(shares, dtype=torch.float64) @ chosen

    center = median(points)
    least = float((points - center).norm(dim=1).sum())
    steps = 1e-3 * torch.randn(200, 8, generator=draw, dtype=torch.float64)
    assert all(float((points - center - step).norm(dim=1).sum()) >= least for step in steps)
    farther = points.clone()
    farther[4] *= 10
    assert float((median(farther) - center).norm()) < 0.05 * float(center.norm())


def write(path, seed, names=(QUERY, CONV), kind="lora", base="sd", **card):
    modules = {name: random_delta(kind, NAMES[name], 2, seed=seed + index) for index, name in enumerate(names)}
    about = {"license": "MIT", "trigger": f"t{seed}", **card}
    write_adapter(path, Adapter(modules, base), card=Card(title=f"a{seed}", **about))
    return path


def test_a_merged_file_names_its_parents_method_and_seed(tmp_path):
    files = [write(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    report = merge_files(
        files, [{"*": 1.0, "unet.down.0.resnets": 0.5}, 0.8], tmp_path / "out.safetensors",
        method="dare", options={"density": 0.6, "rank": 2}, seed=9,
    )  # fmt: skip
    adapter, card = read_adapter(tmp_path / "out.safetensors")
    assert card.title == "a1 by blocks + 0.8 a2"
    assert card.recipe["method"] == "dare"
    assert card.recipe["options"] == {"density": 0.6, "rank": 2}
    assert card.recipe["seed"] == 9
    assert card.recipe["weights"] == [{"*": 1.0, "unet.down.0.resnets": 0.5}, 0.8]
    assert [parent[:2] for parent in card.recipe["parents"]] == ["a1", "a2"]
    assert card.recipe["retained_energy"] == pytest.approx(report.retained, abs=1e-6)
    assert {delta.rank for delta in adapter.modules.values()} == {2}
    first = (tmp_path / "out.safetensors").read_bytes()
    again = tmp_path / "again.safetensors"
    weights = [{"*": 1.0, "unet.down.0.resnets": 0.5}, 0.8]
    merge_files(files, weights, again, method="dare", options={"density": 0.6, "rank": 2}, seed=9)
    assert again.read_bytes() == first


def test_a_refused_merge_writes_nothing(tmp_path):
    one, other = write(tmp_path / "1.safetensors", 1), write(tmp_path / "2.safetensors", 2, base="sdxl")
    dora = write(tmp_path / "3.safetensors", 3, kind="dora")
    out = tmp_path / "out.safetensors"
    with pytest.raises(AdapterError, match="different families"):
        merge_files([one, other], [1.0, 1.0], out)
    with pytest.raises(AdapterError, match="of kind 'dora' depends on the base"):
        merge_files([one, dora], [1.0, 1.0], out, method="linear")
    with pytest.raises(SettingsError, match="has no option 'window'"):
        merge_files([one], [1.0], out, method="ties", options={"window": 0.5})
    with pytest.raises(SettingsError, match="needs the base"):
        merge_files([one], [1.0], out, method="learned")
    assert not out.exists()


def test_an_adapter_of_another_base_is_refused_when_the_base_is_loaded(tmp_path):
    names = ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj",)
    file = write(tmp_path / "1.safetensors", 1, names, kind="dora", base="sdxl")
    with pytest.raises(AdapterError, match="for family 'sdxl', and the base is 'sd'"):
        merge_files([file, file], [0.5, 0.5], tmp_path / "out.safetensors", method="linear", base="tiny")


def test_a_block_of_weight_0_is_omitted_and_weights_of_0_are_refused():
    adapter = Adapter({name: random_delta("lora", NAMES[name]) for name in (QUERY, TEXT)})
    merged, _ = merge_adapters([adapter], [{"text_encoder": 0.0}])
    assert list(merged.modules) == [QUERY]
    assert merged.modules[QUERY] is adapter.modules[QUERY]
    with pytest.raises(SettingsError, match="the merged adapter is zero"):
        merge_adapters([adapter], [0.0])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        return self.down_blocks[1](torch.tanh(self.down_blocks[0](x)))


def learning(per, truth):
    """Returns a small network, two adapters, and losses that are minimal at these weights."""
    torch.manual_seed(0)
    unet = Small()
    names = ["unet.down_blocks.0", "unet.down_blocks.1"]
    deltas = [{name: random_delta("lora", (6, 6), 2, 1.0, 10 * a + i) for i, name in enumerate(names)} for a in (1, 2)]
    parts = [Adapter(modules) for modules in deltas]
    x = torch.randn(64, 6)
    with torch.no_grad():
        twin = Small()
        twin.load_state_dict(unet.state_dict())
        for part, weights in zip(parts, truth, strict=True):
            for index, name in enumerate(names):
                layer = twin.down_blocks[index]
                layer.weight += weights[index] * part.modules[name].delta_weight(layer.weight)
        target = twin(x)
    losses = [lambda half=half: (unet(x[half]) - target[half]).square().mean() for half in (slice(32), slice(32, 64))]
    options = Learned(per=per, steps=150, learning_rate=0.1)
    return unet, parts, losses, options


def test_learned_weights_find_the_true_weights_per_adapter():
    unet, parts, losses, options = learning("adapter", [(0.3, 0.3), (1.2, 1.2)])
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    learned = learn_weights(parts, [1.0, 1.0], {"unet": unet}, losses, options)
    assert learned == pytest.approx([0.3, 1.2], abs=1e-3)
    assert learned == learn_weights(parts, [1.0, 1.0], {"unet": unet}, losses, options)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert not unet.down_blocks[0]._forward_hooks
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_learned_weights_find_the_true_weights_per_block():
    unet, parts, losses, options = learning("block", [(0.3, 0.9), (1.2, 0.1)])
    first, second = learn_weights(parts, [0.5, {"*": 0.5}], {"unet": unet}, losses, options)
    assert first == pytest.approx({"unet.down_blocks.0": 0.3, "unet.down_blocks.1": 0.9}, abs=2e-2)
    assert second == pytest.approx({"unet.down_blocks.0": 1.2, "unet.down_blocks.1": 0.1}, abs=2e-2)


def test_a_loss_that_is_not_finite_stops_the_learning_and_leaves_no_hooks():
    unet, parts, _, options = learning("adapter", [(0.3, 0.3), (1.2, 1.2)])
    with pytest.raises(NonFiniteError, match="at step 1"):
        learn_weights(parts, [1.0, 1.0], {"unet": unet}, [lambda: unet(torch.full((1, 6), torch.inf)).sum()], options)
    assert not unet.down_blocks[0]._forward_hooks


def test_options_are_read_by_method():
    assert parse_options("ties", {"density": 0.3}).density == 0.3
    with pytest.raises(SettingsError, match="unknown merge method 'tie'"):
        parse_options("tie")
    with pytest.raises(SettingsError, match="svd needs rank, energy or error"):
        parse_options("svd")


def test_weights_are_learned_from_captioned_images_on_a_base(untrained_base, tmp_path):
    base = untrained_base("small-sd")
    model = load_base(str(base), device="cpu")
    fresh = create_adapter(model, ["attention", "text"], rank=2, generator=torch.Generator().manual_seed(0))
    files = []
    for seed in (1, 2):
        modules = {
            name: delta.with_factors({k: f + 0.05 * seed for k, f in delta.factors().items()})
            for name, delta in fresh.modules.items()
        }
        files.append(tmp_path / f"{seed}.safetensors")
        write_adapter(files[-1], Adapter(modules, model.family, model.fingerprint))
    name = f"pictures/{'0' * 16}.png"
    write_png(tmp_path / "data" / name, torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    about = {"width": 16, "height": 16, "caption": "a star", "source": "one.png", "split": "train"}
    Manifest(pictures=(ImageEntry(sha256="0" * 64, file=name, **about),)).save(tmp_path / "data")

    def learn(name):
        out = tmp_path / name
        merge_files(
            files,
            [1.0, 1.0],
            out,
            method="learned",
            options={"steps": 3, "timesteps": 2, "per": "block"},
            seed=5,
            base=str(base),
            dataset=tmp_path / "data",
        )
        return out

    first, second = learn("first.safetensors"), learn("second.safetensors")
    assert first.read_bytes() == second.read_bytes()
    learned = read_adapter(first)[1].recipe["learned_weights"]
    assert {"text_encoder", "unet.down_blocks.0"} <= set(learned[0])
    assert all(weight != 1.0 for weights in learned for weight in weights.values())

    def loss(weights):
        parts = denoising_losses(model, tmp_path / "data", tmp_path / "work", seed=5, timesteps=2, trains_text=True)
        merged, _ = merge_adapters([read_adapter(file)[0] for file in files], weights)
        with torch.no_grad(), attach(model, merged):
            return float(sum(part() for part in parts))

    assert loss(learned) < loss([1.0, 1.0])
