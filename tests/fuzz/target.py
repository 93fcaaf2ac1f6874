"""Defines a target, the inputs that follow from its seeds, and the oracle that judges what it does with one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lora_engine.errors import WordedError
from tests.fuzz.files import Files, write_files
from tests.fuzz.guards import TooSlow, bounded, clear
from tests.fuzz.mutate import mutate

_MAX_MESSAGE = 5000
"""Characters of an error; a longer one hides what it says."""


class Finding(AssertionError):
    """What a target did wrong with an input."""


@dataclass(frozen=True)
class Target:
    """A reader, or what computes from what it read.

    Attributes:
        name: Its name on the command line.
        make_seeds: Returns small valid inputs; gets a new folder for files that it needs meanwhile.
        check: Reads an input in a folder and writes only to another folder; raises a `WordedError` for an input that
            it refuses, and an `AssertionError` for one that it accepts without keeping a promise.
        share: Its part of the inputs of a run, relative to the other targets; smaller for slow ones.
    """

    name: str
    make_seeds: Callable[[Path], list[Files]]
    check: Callable[[Path, Path], object]
    share: float = 1.0


@functools.cache
def seeds_of(target: Target, work: Path) -> tuple[Files, ...]:
    """Returns the seeds of a target; made once per process."""
    seeds = target.make_seeds(work / f"{target.name}-seeds")
    assert seeds
    return tuple(seeds)


def input_of(target: Target, seed: int, number: int, work: Path) -> Files:
    """Returns an input, which follows from target, seed and number."""
    random = Random(f"{target.name} {seed} {number}")
    seeds = seeds_of(target, work)
    return mutate(random.choice(seeds), seeds, random)


def try_input(target: Target, files: Mapping[str, bytes], work: Path) -> str:
    """Returns the error by which a target refuses an input; empty if it accepts it.

    Raises:
        Finding: The target raised another error, wrote elsewhere, took too long or too much, or lost something.
    """
    place = work / "input"
    clear(place)
    try:
        folder = write_files(place / "in", files)
        with bounded(place) as output:
            target.check(folder, output)
    except WordedError as error:
        return _judged(error)
    except TooSlow as error:
        raise Finding(str(error)) from error
    except AssertionError as error:
        raise Finding(f"assertion: {error}") from error
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    finally:
        clear(place)
    return ""


def _judged(error: WordedError) -> str:
    message = str(error)
    if not message.strip():
        raise Finding("the error has no words") from error
    if len(message) > _MAX_MESSAGE:
        raise Finding(f"the error has {len(message)} characters: {message[:200]}") from error
    if not message.replace("\n", "").isprintable():
        raise Finding(f"the error has control characters: {message!r}") from error
    return message
