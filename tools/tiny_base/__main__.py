"""Runs `python -m tools.tiny_base`: builds, draws and measures the embedded base."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lora_engine.bases.tiny import WEIGHTS
from lora_engine.errors import EngineError
from tools.tiny_base.world import CONCEPT, Split


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns exit code 0 only on complete success."""
    options = _parser().parse_args(arguments)
    # Progress is plain lines on stdout, readable in a log file.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("tools").setLevel(logging.INFO)
    # Both must precede the import of transformers: no progress bars, no warnings about unused weights.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _COMMANDS[options.command](options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base", description="The embedded base.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train, assemble and measure all parts")
    build.add_argument("--out", type=Path, default=WEIGHTS, help="the folder of the base (default: %(default)s)")
    build.add_argument(
        "--work", type=Path, default=Path("build/tiny"), help="results of the trainings (default: %(default)s)"
    )
    assemble = commands.add_parser("assemble", help="assemble trained parts")
    assemble.add_argument("--work", type=Path, required=True)
    assemble.add_argument("--out", type=Path, default=WEIGHTS)
    draw = commands.add_parser("draw", help="write images of the synthetic world with captions")
    draw.add_argument("--split", choices=get_args(Split), default="train")
    draw.add_argument("--count", type=int, default=12)
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--word", default=CONCEPT, help=f"word for a {CONCEPT} in captions (default: %(default)s)")
    draw.add_argument("--out", type=Path, required=True)
    measure = commands.add_parser("measure", help="measure a base and write the results into its card")
    measure.add_argument("--weights", type=Path, default=WEIGHTS)
    measure.add_argument("--captions", type=int, default=512, help="number of held-out captions (default: %(default)s)")
    stage = commands.add_parser("stage", help="run one training of the build in this process")
    stage.add_argument("name")
    stage.add_argument("--work", type=Path, required=True)
    return parser


def _build(options: argparse.Namespace) -> None:
    from tools.tiny_base.recipe import build

    build(options.work, options.out)
    print(f"The embedded base is in {options.out}.")


def _assemble(options: argparse.Namespace) -> None:
    from tools.tiny_base.assembly import assemble, folder_size

    assemble(options.work, options.out)
    print(f"{options.out}: {folder_size(options.out) / 1e6:.2f} MB")


def _draw(options: argparse.Namespace) -> None:
    from tools.tiny_base.images import write_examples

    paths = write_examples(options.out, options.split, options.count, options.seed, options.word)
    print(f"{len(paths)} images with captions are in {options.out}.")


def _measure(options: argparse.Namespace) -> None:
    from tools.tiny_base.card import write_card
    from tools.tiny_base.measure import measure

    figures = measure(options.weights, captions=options.captions)
    write_card(options.weights, figures)
    print(json.dumps(figures, indent=2, sort_keys=True))


def _stage(options: argparse.Namespace) -> None:
    from tools.tiny_base.recipe import run_stage

    run_stage(options.name, options.work)


_COMMANDS = {"build": _build, "assemble": _assemble, "draw": _draw, "measure": _measure, "stage": _stage}

if __name__ == "__main__":
    sys.exit(main())
