"""Laws for every registered format and every kind that it supports."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from law_adapters import NAMES, SDXL_NAMES, adapters, random_delta, tucker_delta

from lora_engine.adapters import Adapter, kinds
from lora_engine.catalog.kinds import KINDS
from lora_engine.errors import AdapterError
from lora_engine.formats import Card, codecs, detect_codec, inspect, read_adapter, write_adapter
from lora_engine.formats.key_layout import KeyLayout, TableFactorKeys
from lora_engine.formats.kohya import KohyaCodec

pairs = pytest.mark.parametrize(
    ("form", "kind"),
    [(codec, kind) for codec, entry in codecs.items() for kind in kinds if kind in entry.key_layout.factor_keys],
)
few = settings(max_examples=15)
fewer = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])  # they write files


# Settings under which a format supports a kind: ComfyUI applies a magnitude of the outputs differently.
OPTIONS = {("comfyui", "dora"): {"axis": "input"}}


def suited(form, kind):
    return {"families": codecs[form].format.families or ("sd", "sdxl"), "options": OPTIONS.get((form, kind))}


def at_scale_1(adapter):
    modules = {name: type(d).from_factors(d.factors(), float(d.rank)) for name, d in adapter.modules.items()}
    return replace(adapter, modules=modules)


def names_of(adapter):
    return SDXL_NAMES if adapter.base == "sdxl" else NAMES


@pairs
@few
@given(data=st.data())
def test_decode_inverts_encode_and_one_rank_and_alpha_are_exact(form, kind, data):
    uniform = data.draw(st.booleans())
    adapter = data.draw(adapters(kind, uniform=uniform, **suited(form, kind)))
    codec = codecs[form]
    if uniform:
        assert codec.is_lossless(adapter if codec.keeps_alpha else at_scale_1(adapter))
    tensors, metadata = codec.encode(adapter, names=names_of(adapter))
    back = detect_codec(tensors, metadata).decode(tensors, metadata, names_of(adapter))
    assert back == codec.decode(tensors, metadata, names_of(adapter))
    if codec.is_lossless(adapter):
        assert back == adapter
    assert back.base == adapter.base
    assert back.fingerprint == adapter.fingerprint
    assert list(back.modules) == list(adapter.modules)
    for name, delta in adapter.modules.items():
        weight = torch.randn(names_of(adapter)[name], generator=torch.Generator().manual_seed(0))
        expected = delta.delta_weight(weight)
        dtype = next(iter(delta.factors().values())).dtype
        coarse = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        atol = coarse * max(1e-6, float(expected.abs().max()))
        torch.testing.assert_close(back.modules[name].delta_weight(weight), expected, rtol=coarse, atol=atol)


@pairs
@fewer
@given(data=st.data())
def test_a_file_read_and_written_again_has_the_same_bytes(form, kind, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    adapter = data.draw(adapters(kind, **suited(form, kind)))
    names = names_of(adapter)
    card = Card(title="a title", trigger="sks", recipe={"steps": 3}, extra={"ss_note": "kept", "odd": "\u00e9"})
    first = write_adapter(folder / "first", adapter, format=form, card=card, module_names=names)
    back, back_card = read_adapter(folder / "first", names)
    assert back_card == card
    second = write_adapter(folder / "second", back, format=form, card=back_card, module_names=names)
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert read_adapter(folder / "first")[0] == back, "our own files need no base"
    summary = inspect(folder / "first")
    assert summary["format"] == ("kohya" if isinstance(codecs[form], KohyaCodec) else form)
    assert summary["kinds"] == {kind: len(adapter.modules)}


@pytest.mark.parametrize("form", [name for name, codec in codecs.items() if "lora" in codec.key_layout.factor_keys])
def test_a_tucker_core_keeps_its_meaning_in_every_format(form):
    name = "unet.down_blocks.0.resnets.0.conv1"
    adapter = Adapter({name: tucker_delta(NAMES[name])}, "sd")
    back = codecs[form].decode(*codecs[form].encode(adapter, names=NAMES), NAMES)
    weight = torch.zeros(NAMES[name])
    expected = adapter.modules[name].delta_weight(weight)
    torch.testing.assert_close(back.modules[name].delta_weight(weight), expected, rtol=1e-5, atol=1e-5)
    assert codecs[form].is_lossless(adapter) == (back == adapter)


UNKNOWN = "unet.mid_block.attentions.0.proj_out"


@pytest.mark.parametrize("kind", kinds)
def test_an_unknown_module_of_the_base_is_refused_by_every_format(kind):
    to_export = random_delta(kind, (4, 4)).to_export().kind
    able = [name for name, codec in codecs.items() if to_export in codec.key_layout.factor_keys]
    assert "loraline" in able, "the stored format holds every kind"
    for name in able:
        codec, options = codecs[name], OPTIONS.get((name, kind), {})
        adapter = Adapter({UNKNOWN: random_delta(kind, (4, 4), **options)}, "sd").to_export()
        tensors, metadata = codec.encode(adapter, names={**NAMES, UNKNOWN: (4, 4)})
        with pytest.raises(AdapterError, match="base"):
            codec.decode(tensors, metadata, NAMES)


# Runs with `folder`, `names` and `forms` in this process and in another one.
WRITE = """
from pathlib import Path
import torch
from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.formats import Card, write_adapter
make = lambda *shape: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) / 7
delta = lambda rows, columns: LoraDelta(make(2, columns), make(rows, 2).half(), 0.1)
adapter = Adapter({name: delta(*names[name]) for name in set(names)}, "sd", "f" * 64)
shuffled = {name: "e" for name in set(names)}
card = Card(title="t", data=["x", "y"], recipe=shuffled, extra=shuffled)
for form in forms:
    write_adapter(Path(folder) / form, adapter, format=form, card=card, module_names=names)
"""


def test_equal_adapters_give_equal_bytes_in_every_process(tmp_path):
    """The other process has another hash seed, and thus another order of sets of strings."""
    forms = [form for form, codec in codecs.items() if "lora" in codec.key_layout.factor_keys]
    forms = [form for form in forms if "sd" in suited(form, "lora")["families"]]
    files_of, inputs = {}, {"names": {n: shape for n, shape in NAMES.items() if len(shape) == 2}, "forms": forms}
    exec(WRITE, {"folder": tmp_path / "here", **inputs})
    script = "".join(f"{key} = {value!r}\n" for key, value in inputs.items())
    script += f"folder = {str(tmp_path / 'there')!r}\n{WRITE}"
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env={**os.environ, "PYTHONHASHSEED": other})
    for folder in ("here", "there"):
        files = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        files_of[folder] = [(str(path.relative_to(tmp_path / folder)), path.read_bytes()) for path in files]
    assert {name.split("/")[0].removesuffix(".safetensors") for name, _ in files_of["here"]} == set(forms)
    assert len(forms) > 5
    assert files_of["here"] == files_of["there"]


def test_factor_keys_have_the_order_of_the_kinds_whichever_was_added_first():
    layout = KeyLayout("test", writes_alpha=False)
    for kind in reversed(list(KINDS)):
        layout.add(TableFactorKeys(kind, {}))
    layout.add(TableFactorKeys("dora", {}), "dora of loha")
    names = list(layout.factor_keys)
    assert names.index("dora of loha") == names.index("dora") + 1
    assert [name for name in names if name != "dora of loha"] == list(KINDS)
    assert [keys.kind for keys in layout.readable if keys.kind != "dora"] == [kind for kind in KINDS if kind != "dora"]
