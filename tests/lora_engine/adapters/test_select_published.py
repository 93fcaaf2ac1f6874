"""Number of modules that each preset selects on the published architectures."""

from functools import cache

import pytest

from lora_engine.adapters import select_modules
from lora_engine.adapters.published import published_module_shapes
from lora_engine.errors import SettingsError

shapes_of = cache(published_module_shapes)

# Architecture to counts in the order of PRESETS; None is not checked. Attention of SD 3: 8 layers per block (the last
# has no text output), 4 more in each of the 13 blocks of 3.5 medium with a second attention. FLUX: 19 x 8 + 38 x 3.
COUNTS = {
    "sd15": (128, 160, 182, 278, 108, 72),
    "sd2": (128, 160, 214, 278, 108, 138),
    "sdxl": (560, 700, 739, 788, 255, 264),
    "sd3": (191, 285, 333, 333, 0, 432),
    "sd35-medium": (243, 337, 385, 385, None, 432),
    "sd35-large": (303, 453, 529, 529, None, 432),
    "flux": (266, 418, 494, 494, None, 240),
}
PRESETS = ("attention", "attention+ff", "linear", "all", "norms", "text")


@pytest.mark.parametrize("name", COUNTS)
def test_each_preset_selects_this_number_of_layers(name):
    modules = shapes_of(name)
    for preset, count in zip(PRESETS, COUNTS[name], strict=True):
        if count == 0:
            with pytest.raises(SettingsError, match="matches no module"):
                select_modules(modules, preset)
        elif count is not None:
            assert len(select_modules(modules, preset)) == count, preset


def test_the_feed_forward_of_flux_includes_its_single_blocks():
    names = select_modules(shapes_of("flux"), "attention+ff")
    assert "transformer.single_transformer_blocks.37.proj_mlp" in names
    assert "transformer.single_transformer_blocks.37.proj_out" in names
    assert "transformer.transformer_blocks.0.ff_context.net.2" in names
    assert "transformer.proj_out" not in names


def test_the_text_of_flux_is_clip_and_t5():
    names = select_modules(shapes_of("flux"), "text")
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in names
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q" in names
    assert "text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wo" in names
    assert not [name for name in names if name.endswith(("relative_attention_bias", "embed_tokens", "shared"))]
