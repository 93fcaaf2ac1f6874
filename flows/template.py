"""Writes pipeline files: the commented template of `loraline init` and the file of `loraline train`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Template

from pydantic import TypeAdapter, ValidationError

from lora_engine.bases.defaults import training_defaults
from lora_engine.bases.source import TINY, split_hub_id
from lora_engine.families.training_defaults import TrainingDefaults
from lora_engine.files import atomic_write, expand_home
from lora_engine.training.specs.choosing import AUTO
from lora_engine.training.specs.lengths import Steps
from registry.refs import check_name
from tasks.errors import SpecError
from tasks.spec import REGISTERED

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
$resolution
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
$training
    running:
$checkpointing
$init    steps: $steps
    schedule: $schedule
  report:                     # compares the adapter with the base, at the same seeds
    uses: evaluate
    adapter: adapter
    dataset: captions
    gates:
      validation_loss: {max: 0.0}   # must not exceed that of the base on the held-out images; `gates: default` has more
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

_STEPS = 300
_INIT = Template("    init: $init           # continues this adapter; ranks may only grow\n")
_TRAINING = ("rank", "targets", "batch", "learning_rate", "precision")
_AUTOMATIC = {
    "rank": "the smallest of 1 to 32 that is as good as the best",
    "targets": "the blocks that change the loss",
    "learning_rate": "by five short trainings",
}
_REASONS = {
    "precision": "bf16 on a GPU that computes in it, else fp32",
    "batch": "images per forward pass; more need more memory",
    "targets": "the layers that are adapted; a preset",
}
_WORD = r"[^\s<>:,()\[\]{}#\"'&*!|%@`]"
_TRIGGER = re.compile(rf"{_WORD}{{1,64}}")
_CLASS = re.compile(rf"(?=.{{1,64}}$){_WORD}+( {_WORD}+)*")


def write_template(folder: Path, base: str = TINY) -> Path:
    """Creates a folder with a commented pipeline file and an empty folder for images.

    Args:
        folder: The folder.
        base: The base model; see `write_pipeline`.

    Raises:
        EngineError: There is no such base.
        SpecError: A different pipeline file exists.
    """
    training_defaults(base)  # an unknown base leaves no folder behind
    (folder / "images").mkdir(parents=True, exist_ok=True)
    return write_pipeline(folder / "images", "sks", "thing", base=base, output=folder / "pipeline.yaml")


def write_pipeline(
    images: Path,
    trigger: str,
    class_word: str,
    *,
    base: str = TINY,
    name: str | None = None,
    steps: int | str | None = None,
    init: str | None = None,
    output: Path | None = None,
    auto: bool = False,
) -> Path:
    """Writes a pipeline file for a folder of images, with the training defaults of the base.

    Args:
        images: The folder of images.
        trigger: The trigger word of the concept.
        class_word: The class of the concept; may have several words.
        base: The base model; its family has the defaults.
        name: The adapter's name; None means the trigger.
        steps: Number of training steps, or epochs such as `10 epochs`; None means 300.
        init: The adapter to start from: `name@version`, `name@alias` or a file; None starts with no difference.
        output: The file to write; None means NAME.yaml beside the folder of images.
        auto: True lets the training choose rank (without `init`), learning rate, layers, and steps that are not given.

    Raises:
        EngineError: There is no such base.
        SpecError: A word cannot be used, or the file exists with different content.
        VersionError: The name cannot be used.
    """
    if not images.is_dir():
        raise SpecError(f"{str(images)!r} is not a folder", remedy="give the folder with the images")
    for option, word, pattern, allowed in (
        ("--trigger", trigger, _TRIGGER, "one word without spaces and punctuation"),
        ("--class", class_word, _CLASS, "words without punctuation, separated by single spaces"),
    ):
        if not pattern.fullmatch(word):
            raise SpecError(f"invalid word {word!r}", where=option, allowed=allowed)
    name = check_name(name or re.sub(r"[^a-z0-9._-]+", "-", trigger.lower()).strip("-._") or "adapter")
    path = output or images.resolve().parent / f"{name}.yaml"
    defaults = training_defaults(base)
    automatic = {setting for setting in _AUTOMATIC if auto and not (setting == "rank" and init)}
    text = _PIPELINE.substitute(
        file=path.name,
        name=name,
        base=expand_home(base).resolve() if split_hub_id(base) is None and base != TINY else base,
        images=_relative(images, path.parent),
        heldout=0.25 if auto else 0.2,
        resolution=_explain(defaults, "resolution"),
        trigger=trigger,
        class_word=class_word,
        training="\n".join(_explain(defaults, name, auto=name in automatic) for name in _TRAINING),
        checkpointing=_explain(defaults, "gradient_checkpointing"),
        steps=steps or (AUTO if auto else _STEPS),
        schedule="constant" if auto and steps is None else "cosine",
        init=_INIT.substitute(init=_located(init)) if init else "",
    )
    if path.exists() and path.read_text() != text:
        raise SpecError(
            "the file exists with different content",
            where=str(path),
            remedy=f"run it with `loraline run {path}`, or choose another file with -o",
        )
    atomic_write(path, text.encode())
    return path


def read_steps(text: str) -> int | str:
    """Returns the length of a training: a number of steps, or epochs.

    Raises:
        SpecError: It is neither.
    """
    try:
        return TypeAdapter(Steps).validate_python(int(text) if text.isdecimal() else text, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise SpecError(
            f"invalid number {text!r}", where="--steps", allowed=problem[0].lower() + problem[1:]
        ) from error


def _located(init: str) -> str:
    """Returns `name@ref` unchanged, and a file as an absolute path.

    Raises:
        SpecError: It is neither.
    """
    if REGISTERED.fullmatch(init):
        return init
    if not Path(init).is_file():
        raise SpecError(
            f"{init!r} is neither a file nor a registered adapter", where="--init", allowed="a file, or NAME@VERSION"
        )
    return json.dumps(str(Path(init).resolve()))


def words_of(trigger: str | None, class_word: str | None, *, auto: bool) -> tuple[str, str]:
    """Returns the trigger and the class, with `sks` and `thing` for missing ones if the settings are automatic.

    Raises:
        SpecError: One is missing, and the settings are not automatic.
    """
    for option, word in (("--trigger", trigger), ("--class", class_word)):
        if word is None and not auto:
            raise SpecError(f"{option} is missing", where=option, remedy=f"add {option} WORD, or --auto")
    return trigger or "sks", class_word or "thing"


def _explain(defaults: TrainingDefaults, name: str, *, auto: bool = False) -> str:
    """Returns the line of a default in the file, with its reason as a comment."""
    if auto:
        return f"    {name}: {AUTO}".ljust(29) + f" # {_AUTOMATIC[name]}"
    value = getattr(defaults, name)
    written = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    indent = "      " if name == "gradient_checkpointing" else "    "  # within `running`
    reason = defaults.reasons.get(name) or _REASONS.get(name, "default of Loraline")
    return f"{indent}{name}: {written}".ljust(29) + f" # {reason}"


def _relative(images: Path, folder: Path) -> str:
    path, parent = images.resolve(), folder.resolve()
    return f"{path.relative_to(parent)}/" if path.is_relative_to(parent) else str(path)
