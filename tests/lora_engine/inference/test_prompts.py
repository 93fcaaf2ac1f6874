"""The prompt syntax of A1111 and its extensions, with the cases of their sources and documentation."""

from __future__ import annotations

import pytest

from lora_engine.adapters.published import published_module_shapes
from lora_engine.errors import SettingsError
from lora_engine.families import families
from lora_engine.inference.prompts.blocks import (
    block_lists,
    block_of,
    fits_family,
    parse_block_weights,
    parse_layer_weights,
    weight_of_layer,
    weight_of_module,
)
from lora_engine.inference.prompts.editing import texts_by_step
from lora_engine.inference.prompts.prompt import chunks_of, is_unweighted, parse_prompt, plain_text
from lora_engine.inference.prompts.step_weights import ALWAYS, Curve, parse_step_weights
from lora_engine.inference.prompts.tags import AdapterTag, parse_tags


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0.7", [0.7] * 10),
        ("-1", [-1.0] * 10),
        ("0@0,1@0.5", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("0@0,1@1", [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1]),
        ("0.25@0.5,1@1", [0.25] * 5 + [0.4375, 0.625, 0.8125, 1, 1]),
        ("1@0,0.5@3,1@6", [1, 5 / 6, 4 / 6, 0.5, 4 / 6, 5 / 6, 1, 1, 1, 1]),
        ("0.5@3,1@6,1@0", [1, 5 / 6, 4 / 6, 0.5, 4 / 6, 5 / 6, 1, 1, 1, 1]),
        ("0@5,1@6", [0] * 6 + [1] * 4),
        ("0@5;1~6", [0] * 6 + [1] * 4),
        ("0,1", [0] * 10),
        ("1;0@0.3", [1] * 10),
        ("1@0,0", [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]),
    ],
)
def test_weights_over_the_steps_are_those_of_loractl(text: str, weights: list[float]) -> None:
    schedule = parse_step_weights(text)
    assert [schedule.at(step, 10) for step in range(10)] == pytest.approx(weights, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_weights_over_few_steps_are_defined(steps: int) -> None:
    weights = [parse_step_weights("0.25@0,1@1").at(step, steps) for step in range(steps)]
    assert weights[0] == 0.25
    assert steps == 1 or weights[-1] == 1


@pytest.mark.parametrize(
    "text", ["", "a", "0.5@", "@1", "nan", "1e400", "1_0", "0.5@0.2@3", "1@-1", "٣", "0," * 1001 + "1"]
)
def test_weights_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_step_weights(text)


@pytest.mark.parametrize(
    ("text", "curve", "weights"),
    [
        ("0@0,1@4", "linear", [0, 0.25, 0.5, 0.75, 1, 1]),
        ("0@0,1@4", "cosine", [0, (1 - 0.5**0.5) / 2, 0.5, (1 + 0.5**0.5) / 2, 1, 1]),
        ("0@0,1@4", "hold", [0, 0, 0, 0, 1, 1]),
        ("0.1@0,0.4@1,0.9@2", "hold", [0.1, 0.4, 0.9, 0.9, 0.9, 0.9]),
        ("0.3@2,0.8@4", "hold", [0.3, 0.3, 0.3, 0.3, 0.8, 0.8]),
        ("0.7", "cosine", [0.7] * 6),
    ],
)
def test_a_curve_says_how_the_weight_goes_from_point_to_point(text: str, curve: Curve, weights: list[float]) -> None:
    schedule = parse_step_weights(text, curve)
    assert [schedule.at(step, 6) for step in range(6)] == pytest.approx(weights, abs=1e-12)
    (tag,) = parse_tags(f"<lora:z:{text}:curve={curve}>")[1]
    assert tag.denoiser == schedule


def _tag(name: str = "z", te: str = "1", unet: str = "", **more: object) -> AdapterTag:
    return AdapterTag(name, parse_step_weights(unet or te), parse_step_weights(te), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<lora:z>", _tag(is_bare=True)),
        ("<lora:z:0.7>", _tag(te="0.7")),
        ("<lora:z:.5>", _tag(te="0.5")),
        ("<lora:z:0.7:0.5>", _tag(te="0.7", unet="0.5")),
        ("<lyco:z:0.7>", _tag(te="0.7")),
        ("<lora:z:te=0.2>", _tag(te="0.2")),
        ("<lora:z:1:unet=0.5>", _tag(te="1", unet="0.5")),
        ("<lora:z:0.3:te=0.2:unet=0.5>", _tag(te="0.2", unet="0.5")),
        ("<lora:zorb@production:0.7>", _tag("zorb@production", te="0.7")),
        ("<lora:zorb@production:0@0,1@1>", _tag("zorb@production", te="0@0,1@1")),
        ("<lora: a b/c.safetensors : 1>", _tag("a b/c.safetensors")),
        (r"<lora:C:\loras\z.safetensors:0.5>", _tag(r"C:\loras\z.safetensors", te="0.5")),
        ("<lora:z:1:start=3:stop=8>", _tag(start=3, stop=8)),
        ("<lora:z:1:lbw=OUTALL>", _tag(blocks=parse_block_weights("OUTALL"))),
        ("<lora:z:1:w=1,0,0,0,0,0,0,0,0,0,0,1>", _tag(blocks=parse_block_weights("1,0,0,0,0,0,0,0,0,0,0,1"))),
    ],
)
def test_tags_are_read_as_a1111_and_forge_read_them(text: str, tag: AdapterTag) -> None:
    assert parse_tags(f"a {text}  red zorb") == ("a red zorb", [tag])


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("z:0.5@0,1@1:hr=0.6", ("0.5@0,1@1", "0.5@0,1@1", "0.6", "0.6")),
        ("z:hr=0.6:hrte=0.5", ("1", "1", "0.6", "0.5")),
        ("z:0.7:hrte=0.5", ("0.7", "0.7", "0.7", "0.5")),
        ("z:unet=0.5@0,1@1", ("0.5@0,1@1", "1", None, None)),
        ("z:te=0.2:unet=0.4:hrunet=0.9", ("0.4", "0.2", "0.9", "0.2")),
    ],
)
def test_the_pass_over_enlarged_images_has_the_weights_of_loractl(
    text: str, weights: tuple[str, str, str | None, str | None]
) -> None:
    (tag,) = parse_tags(f"<lora:{text}>")[1]
    expected = [None if weight is None else parse_step_weights(weight) for weight in weights]
    assert [tag.denoiser, tag.text_encoder, *(tag.enlarged or (None, None))] == expected


def test_only_a_tag_with_a_name_alone_takes_the_weights_of_its_card() -> None:
    assert [tag.is_bare for tag in parse_tags("<lora:a> <lora:b:1> <lora:c:te=1>")[1]] == [True, False, False]


@pytest.mark.parametrize(
    "text",
    ["a <lora:z>[<lora:a:1>:<lora:b:1>:0.5]", "a <lora:z>[(b <lora:a:1>)|c]", "<lora:z> [b:[c <lora:a>:d:2]:3]"],
)
def test_an_adapter_in_an_edited_bracket_is_refused_by_its_place(text: str) -> None:
    place = text.index("<lora:a") + 1
    with pytest.raises(SettingsError, match=rf"character {place}: .*edits no adapters.*1@0,0@1"):
        parse_tags(text)
    assert len(parse_tags("[a:b:0.5] <lora:z> [c <lora:d>] (e <lora:f>:1.2)")[1]) == 3


@pytest.mark.parametrize(
    ("name", "module", "fits"),
    [
        ("unet.up_blocks.1", "unet.up_blocks.1.resnets.0.conv1", True),
        ("unet.up_blocks.1", "unet.up_blocks.10.resnets.0.conv1", False),
        ("unet.conv_in", "unet.conv_in", True),
        ("*.attn2.*", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q", True),
        ("*.attn2.*", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", False),
        ("mid_block", "unet.mid_block.attentions.0.proj_in", False),
    ],
)
def test_a_layer_has_the_weight_of_the_first_name_that_fits(name: str, module: str, fits: bool) -> None:
    weights = parse_layer_weights(f"{name}=0.5,unet=-2,text_encoder=.25")
    assert weight_of_layer(module, weights) == (0.5 if fits else -2)
    assert weight_of_layer("text_encoder.x", weights) == 0.25
    assert weight_of_layer("transformer.x", weights) == 1


def test_the_same_tag_twice_is_one_adapter_and_two_weights_are_two() -> None:
    assert len(parse_tags("<lora:z:1> <lora:z:1>")[1]) == 1
    assert [tag.denoiser for tag in parse_tags("<lora:z:1> <lora:z:0.5>")[1]] == [
        ALWAYS,
        parse_step_weights("0.5"),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a <lora:z:abc>", r"character 3: tag '<lora:z:abc>': 'abc' .* is not a number"),
        ("<lora:>", "names no adapter"),
        ("<lora: :1>", "names no adapter"),
        ("<lora:z:1:2:3>", "3 weights"),
        ("<lora:z", "unclosed tag"),
        ("<lora:z:nan>", "not a number"),
        ("<hypernet:z:1>", "tag '<hypernet:z:1>'"),
        ("<lora:z:1:dyn=4>", "the dynamic rank of LyCORIS"),
        ("<lora:z:in=0.5>", "SD.Next's weight of the first blocks; use layers=unet.down_blocks="),
        ("<lora:z:1:LBW=B11:0,0,0>", "ComfyUI's Inspire nodes"),
        ("<lora:z:1:1:LBW>", "ComfyUI's Inspire nodes"),
        ("<lora:z:1:MIDD>", "'MIDD' are block weights"),
        ("<lora:z:1:curve=cubic>", "curve 'cubic'"),
        ("<lora:z:1:ag=nan>", "ag is 'nan'"),
        ("<lora:z:1:ag=1@0>", "ag is '1@0'"),
        ("<lora:z:1:layers=unet.mid_block>", "layer weight 'unet.mid_block'"),
        ("<lora:z:1:layers==1>", "layer weight '=1'"),
        ("<lora:z:1:foo=2>", "argument 'foo'"),
        ("<lora:z:1:start=0>", "start is '0'"),
        ("<lora:z:1:lbw=1,2,3>", "3 values"),
        ("<lora:z:1:lbw=outall>", "no such preset"),
        ("<lora:z:1:lbw=R,0,0,0,0,0,0,0,0,0,0,0>", r"block weight 'R' \(value 1\)"),
        ("<lora:z:1> " * 3 + "".join(f"<lora:z{n}:1>" for n in range(101)), "more than 100 adapters"),
    ],
)
def test_tags_that_cannot_be_read_are_refused_by_their_place(text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        parse_tags(text)


def test_an_adapter_between_start_and_stop_has_its_weight_there_alone() -> None:
    (tag,) = parse_tags("<lora:z:0.5:start=3:stop=5>")[1]
    assert [tag.denoiser_weight(step, 6) for step in range(6)] == [0, 0, 0.5, 0.5, 0.5, 0]
    assert not tag.is_constant


@pytest.mark.parametrize(
    ("text", "by_step"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a::4]", [(4, "a"), (10, "")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:20]", [(10, "a")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        (r"a \[b:3\]", [(10, r"a \[b:3\]")]),
        ("(a:1.2) [b]", [(10, "(a:1.2) [b]")]),
        ("a: b | c", [(10, "a: b | c")]),
        ("", [(10, "")]),
    ],
)
def test_texts_are_edited_over_the_steps_as_in_a1111(text: str, by_step: list[tuple[int, str]]) -> None:
    assert texts_by_step(text, 10) == by_step


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[fe|]male", ["female", "male"] * 5),
        ("[a|b|c]", ["a", "b", "c"] * 3 + ["a"]),
        ("[a|(b:1.1)]", ["a", "(b:1.1)"] * 5),
        ("[a|[b:c:5]]", ["a", "b", "a", "b", "a", "c", "a", "c", "a", "c"]),
    ],
)
def test_texts_alternate_each_step(text: str, shown: list[str]) -> None:
    texts = texts_by_step(text, 10)
    assert [next(text for last, text in texts if step <= last) for step in range(1, 11)] == shown


@pytest.mark.parametrize(
    ("text", "by_step"),
    [
        ("[a:b:0.5]", [(10, "b")]),
        ("[a:b:1.5]", [(5, "a"), (10, "b")]),
        ("[a:b:2.0]", [(10, "a")]),
        ("[a:b:5]", [(10, "b")]),
        ("[a:b:14]", [(4, "a"), (10, "b")]),
        ("[a::4] c", [(10, " c")]),
    ],
)
def test_positions_count_on_into_the_pass_over_enlarged_images(text: str, by_step: list[tuple[int, str]]) -> None:
    assert parse_prompt(text).parts[0].by_step(10, is_enlarged=True) == by_step


@pytest.mark.parametrize("text", ["x [a:b:0.1,0.5]", "[before:during:after:0.3,0.7]", "[SEQ:a:2:b:4]", "[a:b:2-5]"])
def test_brackets_with_several_positions_are_refused_by_their_place(text: str) -> None:
    with pytest.raises(SettingsError, match=rf"character {text.index('[') + 1}: .*prompt-control.*nest brackets"):
        parse_prompt(text)


@pytest.mark.parametrize("text", ["x [a|b:0.1]", "[{b|d{:.5]"])
def test_a_bracket_that_programs_read_differently_is_refused_by_its_place(text: str) -> None:
    with pytest.raises(SettingsError, match=rf"character {text.index('[') + 1}: .*both '\|' and ':'"):
        texts_by_step(text, 10)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a zorb", [("a zorb", 1.0)]),
        ("a zorb :0.7", [("a zorb :0.7", 1.0)]),
        ("a AND b", [("a", 1.0), ("b", 1.0)]),
        ("a:1.2 AND b :0.7", [("a", 1.2), ("b", 0.7)]),
        ("a AND b:-1", [("a", 1.0), ("b", -1.0)]),
        ("SAND and BAND", [("SAND and BAND", 1.0)]),
    ],
)
def test_and_divides_a_prompt_into_weighted_parts(text: str, parts: list[tuple[str, float]]) -> None:
    assert [(part.text, part.weight) for part in parse_prompt(text).parts] == parts


def test_break_begins_a_chunk_also_within_brackets() -> None:
    assert chunks_of("a red BREAK  zorb") == [[("a red", 1.0)], [("zorb", 1.0)]]
    assert chunks_of("(a BREAK b:1.3) c") == [[("a", 1.3)], [("b", 1.3), (" c", 1.0)]]
    assert chunks_of("BREAK a") == [[("", 1.0)], [("a", 1.0)]]
    assert chunks_of("BREAKFAST") == [[("BREAKFAST", 1.0)]]


def test_a_plain_text_has_neither_weights_nor_breaks() -> None:
    assert is_unweighted("a red zorb")
    assert is_unweighted(r"a \(red\) zorb")
    assert plain_text(r"a \(red\) zorb") == "a (red) zorb"
    for text in ("a (red) zorb", "a [red] zorb", "a BREAK b"):
        assert not is_unweighted(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a" * 500_001, "500001 characters"), ("a AND " * 20 + "a", "21 parts"), ("a BREAK " * 21, "too many BREAK")],
)
def test_a_prompt_without_end_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        parse_prompt(text)


def test_a_negative_prompt_names_no_adapter_and_has_one_part() -> None:
    assert [part.text for part in parse_prompt("a AND b", is_negative=True).parts] == ["a AND b"]
    with pytest.raises(SettingsError, match="names the adapter 'z'"):
        parse_prompt("ugly <lora:z:1>", is_negative=True)


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("unet.conv_in", "IN00"),
        ("unet.down_blocks.0.attentions.1.proj_in", "IN02"),
        ("unet.down_blocks.0.downsamplers.0.conv", "IN03"),
        ("unet.down_blocks.2.resnets.0.conv1", "IN07"),
        ("unet.down_blocks.3.resnets.1.conv1", "IN11"),
        ("unet.mid_block.attentions.0.proj_in", "MID"),
        ("unet.up_blocks.0.resnets.2.conv1", "OUT02"),
        ("unet.up_blocks.0.upsamplers.0.conv", "OUT02"),
        ("unet.up_blocks.3.attentions.2.proj_out", "OUT11"),
        ("unet.time_embedding.linear_1", None),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "BASE"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "BASE"),
    ],
)
def test_modules_of_a_unet_are_in_the_blocks_of_a1111(module: str, block: str | None) -> None:
    assert block_of(module, "sd") == block


def test_modules_of_flux_are_in_the_blocks_of_the_extension() -> None:
    assert block_of("transformer.transformer_blocks.3.attn.to_q", "flux") == "D03"
    assert block_of("transformer.single_transformer_blocks.37.proj_out", "flux") == "S37"
    assert block_of("transformer.x_embedder", "flux") == "IN"
    assert block_of("transformer.proj_out", "flux") == "OUT"
    assert block_of("text_encoder.encoder.layers.0", "flux") == "CLIP"
    assert block_of("text_encoder_2.encoder.block.0", "flux") == "T5"


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_each_published_attention_is_in_a_block_that_a_list_of_the_family_has(family: str) -> None:
    modules = [
        name for entry in families[family].published for name in published_module_shapes(entry.name) if "attn" in name
    ]
    assert len(modules) > 50
    known = {name for count, names in block_lists().items() for name in names if (count == 61) == (family == "flux")}
    assert {block_of(module, family) for module in modules} <= known


def test_a_short_list_gives_other_blocks_weight_0_and_modules_in_no_block_1() -> None:
    weights = parse_block_weights("1,0,0,0,0,0,0,0,0,0,0,0.5")
    assert fits_family(weights, "sdxl")
    assert not fits_family(weights, "flux")
    assert weight_of_module("unet.up_blocks.1.attentions.2.proj_in", weights, "sdxl") == 0.5
    assert weight_of_module("unet.down_blocks.0.resnets.0.conv1", weights, "sdxl") == 0.0
    assert weight_of_module("text_encoder.x", weights, "sdxl") == 1.0
    assert weight_of_module("unet.time_embedding.linear_1", weights, "sdxl") == 1.0
