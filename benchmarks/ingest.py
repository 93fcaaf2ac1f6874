"""Compares ingest and preprocess with a single-threaded loop of Pillow that does the same work.

    python -m benchmarks.ingest [--images 12] [--rounds 3] [--megapixels 12] [--many 0]

The loop decodes each JPEG, writes it as a clean PNG, reads that, resizes and crops it and writes the result. Rounds
alternate. Prints one JSON object: seconds per image of wall and processor time, with that of the child processes;
`speedup`, the ratio of wall times, which means little on a busy machine; `runnable`, the mean number of threads of
ours, and of its children, that run or could run on a free core, sampled from another process; `extra_cpu`, the
processor time of ours relative to the loop; `expected`, the smaller of `runnable` and the cores divided by `extra_cpu`:
the speedup on free cores. With `--many N`, also the peak memory of the largest process for N small images and for an
eighth of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lora_engine.data.decoders import shared_decoders
from lora_engine.data.ingest import ingest
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import IngestSettings, PreprocessSettings
from lora_engine.parallel import count_cores

_SIDE = 512


def make_photos(folder: Path, count: int, megapixels: float) -> None:
    """Writes JPEGs with the aspect ratio 4:3, smooth areas, edges and some noise."""
    folder.mkdir()
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = height * 4 // 3
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = random.integers(-6, 7, (height, width, 1), dtype=np.int16)
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=92)


def pillow_loop(photos: Path, out: Path) -> None:
    """Does the work with Pillow alone, one image after the other."""
    out.mkdir()
    for path in sorted(photos.iterdir()):
        with Image.open(path) as image:
            ImageOps.exif_transpose(image).convert("RGB").save(out / "clean.png", compress_level=6)
        with Image.open(out / "clean.png") as clean:
            scale = _SIDE / min(clean.size)
            size = (round(clean.width * scale), round(clean.height * scale))
            resized = clean.resize(size, Image.Resampling.LANCZOS)
        left, top = (size[0] - _SIDE) // 2, (size[1] - _SIDE) // 2
        resized.crop((left, top, left + _SIDE, top + _SIDE)).save(out / f"{path.stem}.png", compress_level=6)


def ours(photos: Path, out: Path) -> None:
    """Does the work with the two steps."""
    only_ingest(photos, out)
    preprocess(out / "ingested", out / "prepared", PreprocessSettings(resolution=_SIDE, crop="center"))


def only_ingest(photos: Path, out: Path) -> None:
    """Does the work of the first step."""
    ingest(photos, out / "ingested", IngestSettings())


_SAMPLER = """
import os, sys, time
from pathlib import Path
counts, own = [], sys.argv[1]
print("ready", flush=True)

def states_of(process):
    for task in Path(f"/proc/{process}/task").glob("*"):
        try:
            yield (task / "stat").read_text().rpartition(")")[2].split()[0]
            if process == own:
                for child in (task / "children").read_text().split():
                    if child != str(os.getpid()):
                        yield from states_of(child)
        except OSError:
            pass

while True:
    states = list(states_of(own))
    if not states:
        break
    counts.append(states.count("R"))
    if Path(sys.argv[2]).exists():
        break
    time.sleep(0.005)
print(sum(counts) / max(1, sum(count > 0 for count in counts)))
"""


def count_runnable(work: Callable[[], object], folder: Path) -> float:
    """Runs the work; returns the mean number of runnable threads of this process while at least one is."""
    mark = folder / "done"
    mark.unlink(missing_ok=True)
    command = [sys.executable, "-c", _SAMPLER, str(os.getpid()), str(mark)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sampler:
        assert sampler.stdout is not None
        sampler.stdout.readline()
        work()
        mark.touch()
        return float(sampler.stdout.readline())


def measure(work: Callable[[Path, Path], None], photos: Path) -> tuple[float, float]:
    """Returns wall and processor seconds per image."""
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), _processor_seconds()
        work(photos, Path(folder) / "out")
        taken = time.perf_counter() - wall
        shared_decoders().close()  # their time counts when they have ended
        count = len(list(photos.iterdir()))
        return taken / count, (_processor_seconds() - cpu) / count


def _processor_seconds() -> float:
    uses = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def peak_memory(photos: Path, work: Callable[[Path, Path], None] = ours) -> int:
    """Returns the peak resident memory, in MiB, of the largest process that does our work."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_of, (photos, work))


def _peak_of(photos: Path, work: Callable[[Path, Path], None]) -> int:
    measure(work, photos)
    return max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megapixels", type=float, default=12.0)
    parser.add_argument("--many", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        make_photos(photos, options.images, options.megapixels)
        rounds = [(measure(pillow_loop, photos), measure(ours, photos)) for _ in range(options.rounds)]
        runnable = count_runnable(lambda: measure(ours, photos), Path(folder))
        extra = statistics.median(own[1] / loop[1] for loop, own in rounds)
        result = {
            "cores": count_cores(),
            "loop_wall": statistics.median(loop[0] for loop, _ in rounds),
            "loop_cpu": statistics.median(loop[1] for loop, _ in rounds),
            "ours_wall": statistics.median(own[0] for _, own in rounds),
            "ours_cpu": statistics.median(own[1] for _, own in rounds),
            "speedup": statistics.median(loop[0] / own[0] for loop, own in rounds),
            "runnable": runnable,
            "extra_cpu": extra,
            "expected": min(runnable, count_cores()) / extra,
        }
        if options.many:
            for name, count in (("many", options.many), ("few", options.many // 8)):
                make_photos(Path(folder) / name, count, 0.1)
            result["peak_mib_few"] = peak_memory(Path(folder) / "few")
            result["peak_mib_many"] = peak_memory(Path(folder) / "many")
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
