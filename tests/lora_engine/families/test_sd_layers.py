"""The listed layers of Stable Diffusion are those of the networks of diffusers and transformers, in their order."""

from dataclasses import replace

import pytest

from lora_engine.adapters import DictTree, module_shapes
from lora_engine.adapters.published import empty_module
from lora_engine.families import published
from lora_engine.families.sd.layers import layers_of

LISTED = [name for name, architecture in published.items() if architecture.family in ("sd", "sdxl")]
# Each class and form once: convolutions or linear projections, one or several transformers, with and without text time.
SMALL = [("sd15", "text_encoder"), ("sdxl", "text_encoder_2")]
UNET = published["sdxl"].components["unet"]
NARROW = {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": 8,
    "transformer_layers_per_block": [1, 2, 3],
    "layers_per_block": 1,
}


def built(component):
    """Returns the layers of the network."""
    shapes = module_shapes(DictTree({"unet": empty_module(component)}))
    return [(name.removeprefix("unet."), shape) for name, shape in shapes.items()]


def without_level(layers):
    """Returns the layers by the names of the installed transformers, which may lack the level `text_model`."""
    return [(name.removeprefix("text_model."), shape) for name, shape in layers.items()]


@pytest.mark.parametrize(("name", "part"), SMALL)
def test_the_layers_of_a_text_encoder_are_listed(name, part):
    component = published[name].components[part]
    small = replace(component, config={**component.config, "num_hidden_layers": 2})
    expected = [(path.removeprefix("text_model."), shape) for path, shape in built(small)]
    assert without_level(layers_of(small)) == expected


@pytest.mark.parametrize("changes", [{}, {"use_linear_projection": False}, {"layers_per_block": 2}])
def test_the_layers_of_a_unet_are_listed_in_every_form(changes):
    small = replace(UNET, config={**UNET.config, **NARROW, **changes})
    assert list(layers_of(small).items()) == built(small)


def test_a_unet_without_text_time_is_listed():
    unet = published["sd15"].components["unet"]
    small = replace(unet, config={**unet.config, "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1})
    assert list(layers_of(small).items()) == built(small)


@pytest.mark.nightly
@pytest.mark.parametrize("name", LISTED)
def test_the_layers_of_every_published_architecture_are_listed(name):
    components = published[name].components
    for part in published[name].adaptable:
        expected = [(path.removeprefix("text_model."), shape) for path, shape in built(components[part])]
        assert without_level(layers_of(components[part])) == expected, part


@pytest.mark.parametrize(
    "changes",
    [{"class_embed_type": "timestep"}, {"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3}],
    ids=["setting", "block"],
)
def test_an_unknown_setting_or_block_is_left_to_the_network(changes):
    assert layers_of(replace(UNET, config={**UNET.config, **changes})) is None
    assert layers_of(UNET) is not None


def test_an_unknown_class_is_left_to_the_network():
    assert layers_of(published["flux"].components["transformer"]) is None
