"""What generated images say about themselves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from lora_engine.bases.samplers import SAMPLERS
from lora_engine.data.evidence import read_evidence
from lora_engine.data.pixels import write_png
from lora_engine.inference.image_files import CHUNK, png_texts
from lora_engine.inference.image_metadata import Drawing, UsedAdapter
from lora_engine.inference.prompts.prompt import parse_prompt


def _drawing(
    prompt: str, adapters: list[UsedAdapter], negative: str = "", options: dict[str, Any] | None = None
) -> Drawing:
    return Drawing(
        parse_prompt(prompt),
        parse_prompt(negative, is_negative=True),
        adapters,
        base="tiny",
        fingerprint="f" * 64,
        scheduler="DPMSolverMultistepScheduler",
        scheduler_options=options or {},
        steps=12,
        guidance=3.0,
        version="1.2.3",
    )


def _adapter(folder: Path, reference: str) -> UsedAdapter:
    file = folder / "zorb.safetensors"
    save_file({"a": torch.ones(2)}, file, {"note": reference})
    return UsedAdapter.of_file(file, reference)


def test_the_text_is_what_a1111_writes(tmp_path: Path) -> None:
    adapter = _adapter(tmp_path, "zorb@3")
    drawing = _drawing("a (red:1.2) zorb <lora:zorb@production:0.7>", [adapter], "blue, flat")
    assert drawing.infotext(7, (32, 48)) == (
        "a (red:1.2) zorb <lora:zorb-v3:0.7>\n"
        "Negative prompt: blue, flat\n"
        "Steps: 12, Sampler: DPM++ 2M, CFG scale: 3, Seed: 7, Size: 48x32, Model: tiny, "
        f'Lora hashes: "zorb-v3: {adapter.body_sha256[:12]}", Version: Loraline 1.2.3'
    )


def test_hashes_are_those_of_civitai_and_a1111(tmp_path: Path) -> None:
    first, second = _adapter(tmp_path, "zorb@3"), _adapter(tmp_path, "other.safetensors")
    content = (tmp_path / "zorb.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert second.sha256 == hashlib.sha256(content).hexdigest() != first.sha256
    # Another header changes AutoV2, not AutoV3.
    assert first.body_sha256 == second.body_sha256 == hashlib.sha256(content[8 + header :]).hexdigest()
    assert (first.label, second.label) == ("zorb-v3", "other")
    pickled = tmp_path / "a.pt"
    pickled.write_bytes(b"x" * 20)
    assert UsedAdapter.of_file(pickled, "a.pt").body_sha256 == hashlib.sha256(b"x" * 20).hexdigest()


def test_an_image_holds_its_texts_and_the_same_texts_give_the_same_bytes(tmp_path: Path) -> None:
    prompt = "a zörb 鳥 <lora:zorb@3:0@0,1@1:lbw=OUTALL:start=2>"
    texts = png_texts(_drawing(prompt, [_adapter(tmp_path, "zorb@3")]), 7, (4, 4))
    pixels = torch.zeros(3, 4, 4)
    for name in ("first.png", "second.png"):
        write_png(tmp_path / name, pixels, texts)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    with Image.open(tmp_path / "first.png") as image:
        image.load()
        assert image.text == texts
    facts = json.loads(texts[CHUNK])
    assert facts["prompt"] == "a zörb 鳥"
    (adapter,) = facts["adapters"]
    assert adapter["reference"] == "zorb@3"
    assert adapter["denoiser"] == "0@0,1@1"
    assert (adapter["start"], "stop" in adapter) == (2, False)
    assert adapter["blocks"]["OUT03"] == 1.0
    assert len(adapter["sha256"]) == 64
    write_png(tmp_path / "plain.png", pixels)
    with Image.open(tmp_path / "plain.png") as image:
        assert not image.text


def test_a_value_that_a_reader_would_tear_is_quoted() -> None:
    drawing = Drawing(
        parse_prompt("a"),
        parse_prompt(""),
        [],
        base="my, base",
        fingerprint="",
        scheduler="X",
        scheduler_options={},
        steps=1,
        guidance=1,
        version="1",
    )
    assert 'Model: "my, base", Version' in drawing.infotext(1, (8, 8))


def test_ingest_recognizes_a_generated_image(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", torch.zeros(3, 4, 4), png_texts(_drawing("a zorb", []), 1, (4, 4)))
    assert {"a1111-parameters", "digital-source-type-trained-algorithmic-media"} <= set(
        read_evidence(tmp_path / "a.png", tmp_path)
    )


def test_samplers_have_the_names_of_a1111() -> None:
    options = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
    text = _drawing("a", [], options=options).infotext(1, (8, 8))
    assert "Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale" in text
    classes = {sampler.scheduler for sampler in SAMPLERS.values()}
    for name in classes:
        shown = replace(_drawing("a", []), scheduler=name).infotext(1, (8, 8))
        assert "Scheduler" not in shown
