"""Images with several captions: each use draws one, in every batch the same one again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lora_engine.data.manifest import Manifest
from lora_engine.training.batches import BatchBuilder
from lora_engine.training.examples import Encoder, read_examples
from lora_engine.training.specs.captions import Captions
from tests.lora_engine.training.runs import Ending, Runs, digests
from tests.lora_engine.training.test_combined_datasets import write_part

OTHERS = ("{dawn|dusk}, far", "a third, x")


def write_several(folder: Path, word: str = "star") -> Path:
    """Writes a dataset of three images, of which the first has three captions."""
    manifest = Manifest.load(write_part(folder, word, 3))
    first, *rest = manifest.pictures
    first = first.model_copy(update={"alternatives": OTHERS})
    manifest.model_copy(update={"pictures": (first, *rest)}).save(folder)
    return folder


def test_each_use_of_an_image_draws_one_of_its_captions(bases: dict[str, Path], shared: Any, tmp_path: Path) -> None:
    base, folder = shared[1](str(bases["small-sd"])), write_several(tmp_path / "data")
    examples = read_examples(folder, Manifest.load(folder), "train")
    captions = Captions(wildcards=True, prefix="p ")
    encoder = Encoder(base, tmp_path / "cache", captions)
    encoder.prepare(examples, [""])
    builder = BatchBuilder(base, encoder.latents, encoder.conditioning, examples, batch=3, seed=1, captions=captions)
    drawn = [{e.file.name: e.caption for e in builder(number).examples} for number in range(60)]
    own = Counter(captions[examples[0].file.name] for captions in drawn)
    assert set(own) == {"p star, one, two, three", "p dawn, far", "p dusk, far", "p a third, x"}
    # A third for each caption; that with a wildcard has two texts.
    assert min(own["p star, one, two, three"], own["p a third, x"], own["p dawn, far"] + own["p dusk, far"]) > 10
    assert {captions[examples[1].file.name] for captions in drawn} == {"p star, one, two, three"}
    again = BatchBuilder(base, encoder.latents, encoder.conditioning, examples, batch=3, seed=1, captions=captions)
    assert [e.caption for e in again(7).examples] == [e.caption for e in builder(7).examples]
    # All texts without a draw of their own are encoded before the first step.
    assert len(list((tmp_path / "cache" / "texts").rglob("*.safetensors"))) == 3


def test_a_run_with_several_captions_resumes_to_the_same_bytes(runs: Runs, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataset": write_several(tmp_path / "data"), "method": "finetune", "steps": 4}
    expected = runs("straight", **settings, checkpoint_every=2)
    endings = [Ending(batch=0), Ending(batch=1, crashes=True)]
    out, steps = runs.resume("resumed", endings, **settings, checkpoint_every=2)
    assert steps == [3, 4]
    assert digests(out) == digests(expected)
