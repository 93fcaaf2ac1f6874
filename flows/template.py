"""Writes pipeline files: the commented template of `loraline init` and the file of `loraline train`."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from lora_engine.files import atomic_write
from tasks.errors import SpecError

_PIPELINE = Template("""\
# A Loraline pipeline. `loraline plan $file` shows what a run would do; `loraline run $file` runs it.
# A value that names a step is that step's output. After a change, only the steps that depend on it run again.
name: $name                   # the adapter's name in the registry
base: $base                   # tiny (embedded), a hub id such as owner/name@revision, or a diffusers folder
seed: 7

steps:
  photos:                     # imports the images; a .txt beside an image is its caption
    uses: ingest
    images: $images
    heldout: $heldout                 # share of the images held out from training, for evaluation
  prepared:
    uses: preprocess
    dataset: photos
    resolution: $resolution
    crop: salient
  captions:                   # images without a caption get "a $trigger $class_word"
    uses: caption
    dataset: prepared
    captioner: files
    trigger: $trigger
    class_word: $class_word
  adapter:
    uses: train
    dataset: captions
    method: dreambooth        # preserves the base's prior of the class; finetune does not
    kind: lora
    rank: 8
    targets: $targets
    steps: $steps
    batch: $batch
    learning_rate: $rate
    schedule: cosine
  report:                     # compares the adapter with the base, at the same seeds
    uses: evaluate
    adapter: adapter
    dataset: captions
    gates:
      validation_loss: {max: 0.0}   # must not exceed that of the base on the held-out images
  release:
    uses: register
    adapter: adapter
    report: report
    alias: staging            # set only if the gates pass; promote further with `loraline promote`
  exports:
    uses: convert
    adapter: adapter
    to: [kohya, diffusers, peft]
""")

_WORD = re.compile(r"[^\s<>:,()\[\]{}#\"'&*!|%@`]{1,64}")


def write_template(folder: Path) -> Path:
    """Creates a folder with a commented pipeline file and an empty folder for images.

    Raises:
        SpecError: A different pipeline file exists.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    return write_pipeline(folder / "images", "sks", "thing", name=None, output=folder / "pipeline.yaml")


def write_pipeline(
    images: Path,
    trigger: str,
    class_word: str,
    *,
    base: str = "tiny",
    name: str | None = None,
    steps: int | None = None,
    output: Path | None = None,
) -> Path:
    """Writes a pipeline file with sensible defaults for a folder of images.

    Args:
        images: The folder of images.
        trigger: The trigger word of the concept.
        class_word: The class of the concept.
        base: The base model; the embedded base has other defaults than full-sized ones.
        name: The adapter's name; None means the trigger.
        steps: Number of training steps; None means 300.
        output: The file to write; None means NAME.yaml beside the folder of images.

    Raises:
        SpecError: A word cannot be used, or the file exists with different content.
    """
    if not images.is_dir():
        raise SpecError(f"{str(images)!r} is not a folder", remedy="give the folder with the images")
    for option, word in (("--trigger", trigger), ("--class", class_word)):
        if not _WORD.fullmatch(word):
            raise SpecError(f"invalid word {word!r}", where=option, allowed="one word without spaces and punctuation")
    name = name or re.sub(r"[^a-z0-9._-]+", "-", trigger.lower()).strip("-._") or "adapter"
    path = output or images.resolve().parent / f"{name}.yaml"
    tiny = base == "tiny"
    text = _PIPELINE.substitute(
        file=path.name,
        name=name,
        base=base if tiny or not Path(base).is_dir() else Path(base).resolve(),
        images=_relative(images, path.parent),
        heldout=0.2,
        resolution=32 if tiny else 512,
        trigger=trigger,
        class_word=class_word,
        targets="all" if tiny else "attention",
        steps=steps or 300,
        batch=8 if tiny else 1,
        rate="1.5e-3" if tiny else "1e-4",
    )
    if path.exists() and path.read_text() != text:
        raise SpecError(
            "the file exists with different content",
            where=str(path),
            remedy=f"run it with `loraline run {path}`, or choose another file with -o",
        )
    atomic_write(path, text.encode())
    return path


def _relative(images: Path, folder: Path) -> str:
    path, parent = images.resolve(), folder.resolve()
    return f"{path.relative_to(parent)}/" if path.is_relative_to(parent) else str(path)
