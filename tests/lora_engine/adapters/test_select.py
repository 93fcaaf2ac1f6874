"""Targets: presets, patterns, and refusals."""

import pytest

from lora_engine.adapters import select_modules
from lora_engine.errors import SettingsError

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = {
    "unet.conv_in": (8, 4, 3, 3),
    "unet.time_embedding.linear_1": (8, 8),
    f"{BLOCK}.attn1.to_q": (8, 8),
    f"{BLOCK}.attn2.to_out.0": (8, 8),
    f"{BLOCK}.ff.net.0.proj": (16, 8),
    f"{BLOCK}.ff.net.2": (8, 16),
    "unet.down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
    "unet.mid_block.resnets.0.conv1": (8, 8, 3, 3),
    "unet.mid_block.resnets.0.time_emb_proj": (8, 8),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 8),
}
IN_BLOCKS = [name for name in MODULES if "_block" in name]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", [name for name in MODULES if ".attn" in name and "self" not in name]),
        ("attention+ff", [name for name in MODULES if ".attn" in name or ".ff." in name]),
        ("linear", [name for name in IN_BLOCKS if len(MODULES[name]) == 2]),
        ("all", IN_BLOCKS),
        ("text", [name for name in MODULES if name.startswith("text")]),
        ("unet.*.to_q", [f"{BLOCK}.attn1.to_q"]),
        (["*.to_q", "unet.conv_in"], ["unet.conv_in", f"{BLOCK}.attn1.to_q"]),
        (r"re:unet\.conv_(in|out)", ["unet.conv_in"]),
        ("*", list(MODULES)),
    ],
)
def test_a_target_selects_these_modules(targets, expected):
    expected = [name for name in expected if "self_attn" not in name or targets in ("text", "*")]
    assert select_modules(MODULES, targets) == expected


@pytest.mark.parametrize("targets", ["atention", "unet.*.to_z", "re:nothing", "re:(", [], ["attention", "unet.x"]])
def test_a_target_without_a_match_is_refused_with_the_allowed_targets(targets):
    with pytest.raises(SettingsError) as caught:
        select_modules(MODULES, targets)
    assert "attention+ff" in str(caught.value)


def test_the_error_for_a_mistyped_module_suggests_names():
    with pytest.raises(SettingsError, match=r"unet\.conv_in"):
        select_modules(MODULES, "unet.conv_inn")


SLOW = ["re:(a+)+b", "re:(a|a)*b", "re:((a*)b)*", "re:(a{1,9}){2,9}", "re:.*.*.*.*.*x"]


@pytest.mark.parametrize("target", SLOW)
def test_an_expression_that_can_take_very_long_is_refused(target):
    with pytest.raises(SettingsError, match="can take very long to match"):
        select_modules({"a" * 200: (4, 4)}, target)


@pytest.mark.parametrize(
    "target", [r"re:(.*).*\.(q|k|v)", r"re:x[(+*]*\.(?:ab)+q", r"re:[]a+x*]*\.q", r"re:x\+?(\.a)?\.q"]
)
def test_a_few_repetitions_are_allowed(target):
    assert select_modules({"x.q": (4, 4), "x.abq": (4, 4)}, target)
