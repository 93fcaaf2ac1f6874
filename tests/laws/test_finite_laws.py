"""Laws for every format and every kind: a value that is NaN, infinite or beyond the dtype is never written."""

import math

import pytest
import torch
from law_adapters import NAMES, random_delta

from lora_engine.adapters import Adapter, kinds
from lora_engine.errors import AdapterError
from lora_engine.formats import Embedding, codecs, write_adapter
from lora_engine.formats.embedding_files import embedding_forms

MODULE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OPTIONS = {("comfyui", "dora"): {"axis": "input"}}
pairs = pytest.mark.parametrize(
    ("form", "kind"),
    [
        (name, kind)
        for name, codec in codecs.items()
        for kind in kinds
        if kind in codec.key_layout.factor_keys and "sd" in (codec.format.families or ("sd",))
    ],
)


def adapter_of(form, kind):
    delta = random_delta(kind, NAMES[MODULE], rank=5 if kind.startswith("peft") else 2, **OPTIONS.get((form, kind), {}))
    return delta, Adapter({MODULE: delta}, "sd")


def float_factors(delta):
    return {key: factor for key, factor in delta.factors().items() if factor.is_floating_point() and factor.numel()}


def with_value(delta, key, number):
    broken = delta.factors()[key].clone()
    broken.view(-1)[-1] = number
    return Adapter({MODULE: delta.with_factors({**delta.factors(), key: broken})}, "sd")


@pairs
def test_every_factor_of_a_written_adapter_is_finite(form, kind, tmp_path):
    delta, adapter = adapter_of(form, kind)
    for key in float_factors(delta):
        for number in (math.nan, math.inf, -math.inf):
            with pytest.raises(AdapterError) as caught:
                write_adapter(tmp_path / "new", with_value(delta, key, number), format=form, module_names=NAMES)
            assert MODULE in caught.value.where
            assert repr(key) in caught.value.where
            assert not any(tmp_path.iterdir()), "nothing is half-written"
    assert write_adapter(tmp_path / "new", adapter, format=form, module_names=NAMES)


@pairs
def test_a_value_beyond_the_dtype_names_the_dtypes_that_hold_it(form, kind, tmp_path):
    delta, _ = adapter_of(form, kind)
    key = next(iter(float_factors(delta)))
    with pytest.raises(AdapterError) as caught:
        write_adapter(
            tmp_path / "new", with_value(delta, key, 1e5), format=form, dtype=torch.float16, module_names=NAMES
        )
    assert MODULE in caught.value.where
    assert caught.value.allowed == "bfloat16, float32, float64"
    assert not any(tmp_path.iterdir())


@pairs
def test_an_alpha_that_is_no_number_is_not_written(form, kind, tmp_path):
    delta, _ = adapter_of(form, kind)
    if delta.alpha is None:
        return
    for alpha in (math.nan, math.inf):
        broken = Adapter({MODULE: type(delta).from_factors(delta.factors(), alpha)}, "sd")
        with pytest.raises(AdapterError, match=rf"{MODULE}.*alpha is {alpha}"):
            write_adapter(tmp_path / "new", broken, format=form, module_names=NAMES)
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["loraline", *embedding_forms])
def test_vectors_of_a_token_beyond_the_dtype_are_not_written(form, tmp_path):
    name = next(name for name, codec in codecs.items() if form in (name, codec.embeddings))
    token = Embedding("sks", {"text_encoder": torch.full((1, 4), 1e5)})
    with pytest.raises(AdapterError, match=r"'sks', vectors of text_encoder: 4 of 4 .* Allowed: bfloat16, float32"):
        write_adapter(tmp_path, Adapter(), format=name, dtype=torch.float16, embeddings=[token])
    assert not any(tmp_path.iterdir())
