"""The pipeline files that Loraline writes for people: a commented start, and the one behind `loraline train`."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from lora_engine.files import atomic_write
from tasks.errors import SpecError

_PIPELINE = Template("""\
# A Loraline pipeline. `loraline plan $file` says what a run would do; `loraline run $file` does it.
# Whatever names a step takes that step's result; change a value, and only what depends on it runs again.
name: $name                   # the adapter's name in the registry
base: $base                   # tiny (embedded), a hub id such as owner/name@revision, or a diffusers folder
seed: 7

steps:
  photos:                     # takes the pictures in; a .txt beside a picture is its caption
    uses: ingest
    images: $images
    heldout: $heldout                 # share of the pictures that is kept from training, to measure on
  prepared:
    uses: preprocess
    dataset: photos
    resolution: $resolution
    crop: salient
  captions:                   # pictures without a caption get "a $trigger $class_word"
    uses: caption
    dataset: prepared
    captioner: files
    trigger: $trigger
    class_word: $class_word
  adapter:
    uses: train
    dataset: captions
    method: dreambooth        # keeps other pictures of the class as they were; finetune leaves that out
    kind: lora
    rank: 8
    targets: $targets
    steps: $steps
    batch: $batch
    learning_rate: $rate
    schedule: cosine
  report:                     # what it does, against the base with the same seeds
    uses: evaluate
    adapter: adapter
    dataset: captions
    gates:
      validation_loss: {max: 0.0}   # must not be worse than the base on what it has not seen
  release:
    uses: register
    adapter: adapter
    report: report
    alias: staging            # given only if the gates pass; `loraline promote` takes it from there
  exports:
    uses: convert
    adapter: adapter
    to: [kohya, diffusers, peft]
""")

_WORD = re.compile(r"[^\s<>:,()\[\]{}#\"'&*!|%@`]{1,64}")


def write_template(folder: Path) -> Path:
    """Makes a folder with a commented pipeline file and an empty folder for pictures.

    Raises:
        SpecError: There is a pipeline file already.
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
    """Writes a pipeline file with sensible defaults for a folder of pictures.

    Args:
        images: The folder of pictures.
        trigger: The word that will call the concept.
        class_word: What the concept is.
        base: The base model; the defaults of the embedded one differ from those of a full-sized one.
        name: The adapter's name; the trigger by default.
        steps: Training steps; 300 by default.
        output: The file to write; NAME.yaml beside the folder of pictures by default.

    Raises:
        SpecError: A word that cannot be used, or the file exists and says something else.
    """
    if not images.is_dir():
        raise SpecError(f"{str(images)!r} is not a folder", remedy="give the folder that holds the pictures")
    for option, word in (("--trigger", trigger), ("--class", class_word)):
        if not _WORD.fullmatch(word):
            raise SpecError(f"{word!r}", where=option, allowed="one word without spaces and punctuation")
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
            "exists and says something else",
            where=str(path),
            remedy=f"run it with `loraline run {path}`, or name another with -o",
        )
    atomic_write(path, text.encode())
    return path


def _relative(images: Path, folder: Path) -> str:
    resolved, beside = images.resolve(), folder.resolve()
    return f"{resolved.relative_to(beside)}/" if resolved.is_relative_to(beside) else str(resolved)
