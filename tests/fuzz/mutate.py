"""Mutates an input: chooses one of its files and, by the file's suffix, a mutator that knows its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from random import Random

from tests.fuzz.files import TEXT, Files
from tests.fuzz.mutate_bytes import MAX_SIZE, mutate_bytes, mutate_text
from tests.fuzz.mutate_containers import mutate_database, mutate_png, mutate_tar, mutate_zip
from tests.fuzz.mutate_tree import mutate_json, mutate_yaml
from tests.fuzz.mutate_weights import mutate_weights

Mutator = Callable[[bytes, Sequence[bytes], Random], bytes]
MUTATORS: Mapping[str, Sequence[Mutator]] = {
    ".safetensors": (mutate_weights, mutate_weights, mutate_weights, mutate_bytes),
    ".json": (mutate_json, mutate_json, mutate_text, mutate_bytes),
    ".yaml": (mutate_yaml, mutate_text, mutate_text, mutate_bytes),
    ".toml": (mutate_text, mutate_text, mutate_bytes),
    ".sh": (mutate_text, mutate_text, mutate_bytes),
    ".csv": (mutate_text, mutate_text, mutate_bytes),
    ".txt": (mutate_text, mutate_text, mutate_bytes),
    ".png": (mutate_png, mutate_png, mutate_bytes),
    ".pt": (mutate_zip, mutate_zip, mutate_bytes),
    ".tar": (mutate_tar, mutate_tar, mutate_bytes),
    ".db": (mutate_database,),
    "": (mutate_text, mutate_text, mutate_text, mutate_bytes),
}
_NAMES = (
    "a\nb",
    "-rf",
    "..x",
    "x" * 200,
    "\u202eabc",
    "a b",
    "\xe4",
    "CON",
    "%",
    "A",
    "x.safetensors",
    "x.yaml",
    "1.png",
)


def mutate(files: Mapping[str, bytes], seeds: Sequence[Files], random: Random) -> Files:
    """Returns a changed input.

    Args:
        files: The input.
        seeds: Inputs of the same target, whose files of the same suffix lend parts.
        random: The source of all choices.
    """
    changed = dict(files)
    if not changed:
        return changed
    if len(changed) > 1 and random.random() < 0.1:
        _change_names(changed, random)
    for _ in range(1 if len(changed) < 2 else random.choice((1, 1, 2))):
        name = random.choice(sorted(changed))
        suffix = PurePosixPath(name).suffix.lower()
        others = [content for seed in seeds for other, content in seed.items() if other.lower().endswith(suffix)]
        mutator = random.choice(MUTATORS.get(suffix, (mutate_bytes,)))
        changed[name] = mutator(changed[name], random.sample(others, min(2, len(others))), random)[: 4 * MAX_SIZE]
    return changed


def _change_names(files: Files, random: Random) -> None:
    name = random.choice(sorted(files))
    if name == TEXT:
        return
    path = PurePosixPath(name)
    match random.randrange(3):
        case 0:
            del files[name]
        case 1:
            files[path.with_name(random.choice(_NAMES)).as_posix()] = files.pop(name)
        case _:
            files[path.with_name(random.choice(_NAMES) + path.suffix).as_posix()] = files[name]
