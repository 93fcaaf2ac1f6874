"""How the embedded base is made: its stages in order, their seeds and sizes, and the processes that run them.

Each stage saves what it made in a working folder and is skipped when that is there, so an interrupted build continues with
the stage that it was in. What the stages do is in the modules of the parts; the finished folder is made by `assemble`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_engine.bases.tiny import pictures, world
from lora_engine.bases.tiny.fitting import Peers, Schedule, join_peers

log = logging.getLogger(__name__)

_SHARDS = 2
_FINISHED = "finished"


@dataclass(frozen=True)
class Recipe:
    """Every number of the build. The pictures are redrawn from their seeds; no picture is stored."""

    pictures: int = 16_000
    picture_seed: int = 1
    judge: Schedule = Schedule(1100, 2e-3, weight_decay=1e-2)
    judge_seed: int = 3
    clip: Schedule = Schedule(1100, 1.2e-3)
    clip_seed: int = 7
    vae: Schedule = Schedule(1600, 2e-3, weight_decay=1e-4)
    vae_seed: int = 0
    text: Schedule = Schedule(200, 2e-3)
    denoiser: Schedule = Schedule(2000, 1.3e-3, warmup=60)
    denoiser_batch: int = 24
    denoiser_seed: int = 3
    save_every: int = 200

    def scaled(self, factor: float) -> Recipe:
        """The recipe with all numbers of steps multiplied by `factor`, at least one step each."""

        def shorter(schedule: Schedule) -> Schedule:
            return replace(schedule, steps=max(1, round(schedule.steps * factor)))

        names = ("judge", "clip", "vae", "text", "denoiser")
        return replace(self, **{name: shorter(getattr(self, name)) for name in names})


def run_stages(recipe: Recipe, work: Path, *, processes: int = 2) -> None:
    """Runs the stages that are not finished in `work`: tokenizer, judge beside CLIP, autoencoder, denoiser.

    Args:
        recipe: The numbers.
        work: Where the stages keep what they made.
        processes: How many processes share each of the long stages; one a core.
    """
    work.mkdir(parents=True, exist_ok=True)
    _once(work, "tokenizer", lambda: _make_tokenizer(work))
    _in_processes([("judge", 0, 1), ("clip", 0, 1)], recipe, work)
    for stage in ("vae", "denoiser"):
        _in_processes([(stage, rank, processes) for rank in range(processes)], recipe, work)


def run_stage(stage: str, rank: int, count: int, recipe: Recipe, work: Path) -> None:
    """One process's part of a stage, unless the stage is finished.

    Args:
        stage: `judge`, `clip`, `vae` or `denoiser`.
        rank: Which of the processes this one is, from 0.
        count: How many processes run this stage.
        recipe: The numbers.
        work: The working folder of the build.
    """
    if (work / f"{stage}.{_FINISHED}").exists():
        return
    peers = join_peers(rank, count, work / f"{stage}.meeting")
    _STAGES[stage](recipe, work, peers)
    peers.wait()
    if rank == 0:
        (work / f"{stage}.{_FINISHED}").touch()


def load_tokenizer(work: Path) -> Any:
    """The tokenizer that the build has made."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(work / "tokenizer", local_files_only=True)


def _make_tokenizer(work: Path) -> None:
    from lora_engine.bases.tiny.tokenizer import build_tokenizer

    build_tokenizer().save_pretrained(work / "tokenizer")


def _train_judge(recipe: Recipe, work: Path, peers: Peers) -> None:
    from lora_engine.bases.tiny.judge import train_judge

    seed, count = recipe.judge_seed, recipe.pictures
    known = world.scenes(seed, 3 * count // 2)
    unseen = world.scenes(seed + 1, count // 5, "heldout")
    concept = world.scenes(seed + 2, count // 3, "concept")
    judge = train_judge([*known, *unseen, *concept], recipe.judge, seed=seed)
    save_file(judge.state_dict(), work / "judge.safetensors")


def _train_clip(recipe: Recipe, work: Path, peers: Peers) -> None:
    from lora_engine.bases.tiny.clip import train_clip

    scenes = world.scenes(recipe.clip_seed, recipe.pictures)
    clip = train_clip(scenes, load_tokenizer(work), recipe.clip, seed=recipe.clip_seed)
    clip.model.save_pretrained(work / "clip")
    save_file(clip.heads.state_dict(), work / "clip" / "heads.safetensors")


def _train_vae(recipe: Recipe, work: Path, peers: Peers) -> None:
    from lora_engine.bases.tiny.vae import encode_drawings, measure_psnr, train_vae

    drawings = pictures.stack_drawings(world.scenes(recipe.picture_seed, recipe.pictures))
    vae = train_vae(drawings, recipe.vae, seed=recipe.vae_seed, peers=peers)
    if peers.rank == 0:
        vae.save_pretrained(work / "vae")
        unseen = pictures.stack_drawings(world.scenes(recipe.vae_seed + 99, 256, "any"))
        log.info("vae: %.1f dB on drawings that it has not seen", measure_psnr(vae, unseen))
    for shard, part in list(enumerate(drawings.chunk(_SHARDS)))[peers.rank :: peers.count]:
        save_file({"latents": encode_drawings(vae, part).half()}, work / f"latents-{shard}.safetensors")


def _train_denoiser(recipe: Recipe, work: Path, peers: Peers) -> None:
    from lora_engine.bases.tiny.unet import Denoiser, train_denoiser

    def save(step: int, denoiser: Denoiser) -> None:
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.denoiser.steps:
            denoiser.unet.save_pretrained(work / "unet")
            denoiser.text_encoder.save_pretrained(work / "text_encoder")

    latents = [load_file(work / f"latents-{shard}.safetensors")["latents"] for shard in range(_SHARDS)]
    train_denoiser(
        world.scenes(recipe.picture_seed, recipe.pictures),
        torch.cat(latents),
        load_tokenizer(work),
        text_schedule=recipe.text,
        schedule=recipe.denoiser,
        batch=recipe.denoiser_batch,
        seed=recipe.denoiser_seed,
        peers=peers,
        save=save,
    )


_STAGES: dict[str, Callable[[Recipe, Path, Peers], None]] = {
    "judge": _train_judge,
    "clip": _train_clip,
    "vae": _train_vae,
    "denoiser": _train_denoiser,
}


def _once(work: Path, stage: str, make: Callable[[], None]) -> None:
    mark = work / f"{stage}.{_FINISHED}"
    if not mark.exists():
        make()
        mark.touch()


def _in_processes(parts: list[tuple[str, int, int]], recipe: Recipe, work: Path) -> None:
    """Runs (stage, rank, count) at the same time, each in a fresh process; stops the others when one fails."""
    parts = [part for part in parts if not (work / f"{part[0]}.{_FINISHED}").exists()]
    for stage, _, _ in parts:
        (work / f"{stage}.meeting").unlink(missing_ok=True)
    if not parts:
        return
    with _allocator_that_keeps_pages():
        torch.multiprocessing.spawn(_work, args=(parts, recipe, work), nprocs=len(parts))  # type: ignore[no-untyped-call]


def _work(number: int, parts: list[tuple[str, int, int]], recipe: Recipe, work: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(parts)))
    stage, rank, count = parts[number]
    run_stage(stage, rank, count, recipe, work)


@contextmanager
def _allocator_that_keeps_pages() -> Iterator[None]:
    # glibc gives every large tensor back to the kernel, and faulting its pages in again costs the small networks of this
    # recipe about a quarter of their time. It reads its settings when a process starts: hence the environment.
    settings = {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 28),
        # The processes meet on the loopback interface; without this gloo asks the resolver for the machine's name.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
