"""Laws of the digests and sketches of content, over every format and kind."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from law_adapters import NAMES, SDXL_NAMES, adapters, random_delta
from test_format_laws import OPTIONS, pairs, suited

from lora_engine.adapters import Adapter, LoraDelta, kinds
from lora_engine.catalog.formats import written_formats
from lora_engine.formats import Bundle, Card, Embedding, codecs, detect_codec, read_bundle, write_adapter
from lora_engine.formats.content import SIZE, content_of, similarity
from lora_engine.merging.resize import resize

few = settings(max_examples=3)
fewer = settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])


def content(adapter, embeddings=()):
    return content_of(Bundle(adapter, Card(), tuple(embeddings)))


def close(first, second):
    return similarity(content(first).sketch, content(second).sketch)


@pairs
@few
@given(data=st.data())
def test_the_content_survives_every_format_that_stores_it_unchanged(form, kind, data):
    adapter = data.draw(adapters(kind, **suited(form, kind)))
    codec, names = codecs[form], SDXL_NAMES if adapter.base == "sdxl" else NAMES
    tensors, metadata = codec.encode(adapter, names=names)
    back = detect_codec(tensors, metadata).decode(tensors, metadata, names)
    assert close(adapter, back) > 0.999
    # A scale that a format folds into a factor is folded in the digest, too.
    if codec.is_lossless(adapter) or kind == "lora":
        assert content(back).digests == content(adapter).digests != {}


@fewer
@given(data=st.data())
def test_the_content_of_a_lora_survives_files_of_all_formats_one_after_another(data, tmp_path_factory):
    folder, adapter = tmp_path_factory.mktemp("chain"), data.draw(adapters("lora", families=("sd",)))
    expected, step = content(adapter), adapter
    for number, form in enumerate(data.draw(st.permutations(sorted(written_formats())))):
        path = folder / str(number)
        write_adapter(path, step, format=form, card=Card(title=form), module_names=NAMES)
        step = read_bundle(path, NAMES).adapter
        assert content(step) == expected, form


@pytest.mark.parametrize("kind", kinds)
def test_every_value_name_and_kind_counts(kind):
    name, other = "unet.mid_block.attentions.0.proj_out", "unet.mid_block.attentions.0.proj_in"
    delta = random_delta(kind, (10, 20))
    first = content(Adapter({name: delta})).deltas
    for key, factor in delta.factors().items():
        changed = factor.clone()
        changed.view(-1)[-1] += 1.0
        assert content(Adapter({name: delta.with_factors({**delta.factors(), key: changed})})).deltas != first, key
    assert content(Adapter({other: delta})).deltas != first
    assert content(Adapter({name: delta, other: delta})).deltas != first
    assert content(Adapter({name: delta}, "sdxl", "f" * 64)).deltas == first, "the base is no part of the content"


def test_dtype_kernel_and_sign_of_zero_are_no_part_of_the_content():
    down, up = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.ones(6, 2)
    up[0, 0] = 0.0
    plain = LoraDelta(down.half(), up.half(), 2.0)
    wide = LoraDelta(down.half().double()[:, :, None, None], -(-up.double())[:, :, None, None], 2.0)
    assert content(Adapter({"unet.a": plain})).deltas == content(Adapter({"unet.a": wide})).deltas
    exact = LoraDelta(down.double() / 3, up.double(), 2.0)
    assert (
        content(Adapter({"unet.a": exact})).deltas != content(Adapter({"unet.a": exact}).to(dtype=torch.float32)).deltas
    )


def test_a_module_without_effect_is_no_content():
    delta, nothing = random_delta("lora", (6, 5)), LoraDelta(torch.ones(2, 5), torch.zeros(6, 2), 2.0)
    assert content(Adapter({"unet.a": delta, "unet.b": nothing})) == content(Adapter({"unet.a": delta}))
    assert content(Adapter({"unet.b": nothing})).digests == {}
    assert content(Adapter({})).sketch is None


def test_tokens_are_content_of_their_own_whatever_they_are_called():
    vectors = {"text_encoder": torch.ones(2, 8)}
    adapter = Adapter({"unet.a": random_delta("lora", (6, 5))})
    named = content(adapter, [Embedding("sks", vectors)])
    assert named.digests.keys() > content(adapter).digests.keys()
    assert content(Adapter({}), [Embedding("other", vectors)]).embeddings == named.embeddings
    changed = {"text_encoder": torch.full((2, 8), 1.0).index_fill(0, torch.tensor(0), 2.0)}
    assert content(Adapter({}), [Embedding("sks", changed)]).embeddings != named.embeddings


def draw_lora(seed, rank=8):
    draw = torch.Generator().manual_seed(seed)
    factors = [(torch.randn(rank, 48, generator=draw), torch.randn(32, rank, generator=draw)) for _ in range(6)]
    return Adapter({f"unet.layer.{n}": LoraDelta(down, up, 4.0) for n, (down, up) in enumerate(factors)})


def test_casts_scales_and_resizes_stay_similar_and_others_do_not():
    adapter = draw_lora(0)
    assert close(adapter, adapter.to(dtype=torch.bfloat16)) > 0.999
    for factor in (0.3, -2.0):
        scaled = {name: replace(delta, alpha=delta.alpha * factor) for name, delta in adapter.modules.items()}
        assert close(adapter, Adapter(scaled)) > 0.999
    smaller, report = resize(adapter, rank=5)
    # The cosine of a delta and its best approximation is the root of the energy that it keeps.
    assert close(adapter, smaller) == pytest.approx(report.retained**0.5, abs=0.1)
    assert max(close(adapter, draw_lora(seed)) for seed in range(1, 40)) < 0.4


@pytest.mark.parametrize("kind", [kind for kind in kinds if kind != "lora"])
def test_a_cast_of_every_kind_stays_similar(kind):
    options = OPTIONS.get(("comfyui", kind), {})
    adapter = Adapter({"unet.a": random_delta(kind, (10, 20), **options)}).to_export()
    assert close(adapter, adapter.to(dtype=torch.float16)) > 0.99


def test_digest_and_sketch_are_the_same_in_every_release_and_on_every_machine():
    values = torch.arange(12, dtype=torch.float32)
    delta = LoraDelta(values.reshape(2, 6) / 8, values.flip(0)[:8].reshape(4, 2) / 4, 1.0)
    fixed = content(Adapter({"unet.a": delta}))
    assert fixed.deltas == "7ae5632d03d82d1f50a4a8b5b1509ebca6a0e028a283ca4c6e40f5539690cff7"
    assert len(fixed.sketch) == SIZE
    large = {index: round(value, 6) for index, value in enumerate(fixed.sketch) if abs(value) > 0.2}
    assert large == {85: 0.242057, 99: 0.31825, 149: 0.22213, 158: -0.395614, 160: -0.559135}
