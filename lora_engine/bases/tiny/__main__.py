"""`python -m lora_engine.bases.tiny`: builds the embedded base, draws its pictures, measures it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lora_engine.bases.tiny.world import CONCEPT, Split
from lora_engine.errors import EngineError

_WEIGHTS = Path(__file__).resolve().parent / "weights"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is 0 only where all of it was done."""
    options = _parser().parse_args(arguments)
    # Progress is plain lines on the standard output, so that it can be followed in a file.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("lora_engine").setLevel(logging.INFO)
    # transformers draws bars while it loads and tells of what this base does not need; both before it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _COMMANDS[options.command](options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is finished stays, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_engine.bases.tiny", description="The embedded base.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train all parts, put them together and measure them")
    build.add_argument("--out", type=Path, default=_WEIGHTS, help="the folder of the base (default: %(default)s)")
    build.add_argument("--work", type=Path, default=Path("build/tiny"), help="results of the single trainings")
    assemble = commands.add_parser("assemble", help="put trained parts together")
    assemble.add_argument("--work", type=Path, required=True)
    assemble.add_argument("--out", type=Path, default=_WEIGHTS)
    draw = commands.add_parser("draw", help="write pictures of the drawn world with their captions")
    draw.add_argument("--split", choices=get_args(Split), default="train")
    draw.add_argument("--count", type=int, default=12)
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--word", default=CONCEPT, help=f"what captions call a {CONCEPT} (default: %(default)s)")
    draw.add_argument("--out", type=Path, required=True)
    measure = commands.add_parser("measure", help="measure a base and write the figures into its card")
    measure.add_argument("--weights", type=Path, default=_WEIGHTS)
    measure.add_argument("--captions", type=int, default=512, help="how many held-out captions the base is asked for")
    stage = commands.add_parser("stage", help="one training of the build, in this process")
    stage.add_argument("name")
    stage.add_argument("--work", type=Path, required=True)
    return parser


def _build(options: argparse.Namespace) -> None:
    from lora_engine.bases.tiny.recipe import build

    build(options.work, options.out)
    print(f"The embedded base is in {options.out}.")


def _assemble(options: argparse.Namespace) -> None:
    from lora_engine.bases.tiny.assembly import assemble, folder_size

    assemble(options.work, options.out)
    print(f"{options.out}: {folder_size(options.out) / 1e6:.2f} MB")


def _draw(options: argparse.Namespace) -> None:
    from lora_engine.bases.tiny.pictures import write_examples

    paths = write_examples(options.out, options.split, options.count, options.seed, options.word)
    print(f"{len(paths)} pictures with captions are in {options.out}.")


def _measure(options: argparse.Namespace) -> None:
    from lora_engine.bases.tiny.card import write_card
    from lora_engine.bases.tiny.measure import measure

    figures = measure(options.weights, captions=options.captions)
    write_card(options.weights, figures)
    print(json.dumps(figures, indent=2, sort_keys=True))


def _stage(options: argparse.Namespace) -> None:
    from lora_engine.bases.tiny.recipe import run_stage

    run_stage(options.name, options.work)


_COMMANDS = {"build": _build, "assemble": _assemble, "draw": _draw, "measure": _measure, "stage": _stage}

if __name__ == "__main__":
    sys.exit(main())
