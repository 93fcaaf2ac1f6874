"""Targets that read adapters, embeddings and headers of models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters import Adapter
from lora_engine.bases.tiny import WEIGHTS as BASE
from lora_engine.catalog.formats import written_formats
from lora_engine.checkpoints.inspect import inspect_checkpoint, is_checkpoint
from lora_engine.errors import EngineError
from lora_engine.formats import Card, inspect, read_bundle, write_adapter
from lora_engine.formats.card import read_card
from lora_engine.formats.codec import codecs
from lora_engine.formats.embedding_files import read_embeddings, write_embeddings
from lora_engine.formats.embeddings import FIRST, SECOND, Embedding
from lora_engine.formats.family import families_of_tensors
from lora_engine.formats.files import Bundle
from lora_engine.formats.safetensors_io import read_header, write_safetensors
from tests.fuzz.files import Files, read_files
from tests.fuzz.target import Target
from tests.laws.law_adapters import NAMES, SDXL_NAMES, names_for, random_delta, tucker_delta
from tests.lora_engine.formats.bad_corpus import CORPUS

_KINDS = (
    *("lora", "dora", "loha", "lokr", "oft", "boft", "ia3", "full", "glora", "peft-ia3", "peft-oft", "peft-boft"),
)
_TOKENS = (
    Embedding("zorb", {FIRST: torch.arange(8.0).reshape(2, 4)}),
    Embedding("<two>", {FIRST: torch.ones(1, 4), SECOND: torch.ones(1, 6)}),
)


def _adapter(kind: str, names: Mapping[str, tuple[int, ...]] = NAMES, base: str = "sd", most: int = 3) -> Adapter:
    chosen = names_for(kind, names)[:most]
    rank = {"peft-oft": 5, "peft-boft": 5}.get(kind, 2)
    return Adapter({name: random_delta(kind, names[name], rank, seed=n) for n, name in enumerate(chosen)}, base)


def _adapters() -> Iterator[Adapter]:
    for kind in _KINDS:
        yield _adapter(kind)
    yield _adapter("lora", SDXL_NAMES, "sdxl", 12)
    name = "unet.down_blocks.0.resnets.0.conv1"
    yield Adapter({name: tucker_delta(NAMES[name])}, "sd")


def _written(folder: Path, *, folders: bool) -> list[Files]:
    """Returns adapters of each kind in each format that holds it, with and without learned tokens."""
    found = []
    card = Card(title="zorb", trigger="zorb", extra={"ss_network_args": '{"conv_dim": "4"}'})
    for number, adapter in enumerate(_adapters()):
        for name, form in written_formats().items():
            if form.is_folder != folders or (number > 0 and name not in ("loraline", "kohya", "peft", "comfyui")):
                continue
            path = folder / f"{number}-{name}{'' if folders else '.safetensors'}"
            tokens = _TOKENS[:1] if number == 0 else ()
            try:
                write_adapter(path, adapter, format=name, card=card, embeddings=tokens)
            except EngineError:
                continue
            if folders:
                found.append(read_files(path))
            else:
                found.append({"adapter.safetensors": path.read_bytes()})
    return found


def _corpus(folder: Path) -> Iterator[Files]:
    """Yields the files of the corpus of odd files that are read."""
    folder.mkdir(parents=True)
    for number, case in enumerate(CORPUS.values()):
        if not case.refusal and not case.dangerous and not case.named and case.file.endswith(".safetensors"):
            path = folder / str(number) / case.file
            path.parent.mkdir()
            case.build(path)
            if path.is_file() and path.stat().st_size < 100_000:
                yield {"adapter.safetensors": path.read_bytes()}


def _seed_adapters(folder: Path) -> list[Files]:
    return [*_written(folder / "written", folders=False), *_corpus(folder / "corpus")]


def _seed_folders(folder: Path) -> list[Files]:
    parts = _adapter("lora", most=99)
    write_adapter(folder / "parts", parts, format="peft", embeddings=_TOKENS[:1])
    seeds = [*_written(folder / "written", folders=True), read_files(folder / "parts")]
    write_adapter(folder / "beside", _adapter("lora"), format="diffusers", embeddings=_TOKENS)
    return [*seeds, read_files(folder / "beside")]


def _seed_embeddings(folder: Path) -> list[Files]:
    seeds = []
    for form in ("kohya", "diffusers"):
        for number, token in enumerate(_TOKENS):
            write_embeddings(folder / f"{form}{number}", [token], form)
            seeds.append(read_files(folder / f"{form}{number}"))
    write_safetensors(folder / "bare.safetensors", {"zorb": torch.ones(4)}, {})
    return [*seeds, {"bare.safetensors": (folder / "bare.safetensors").read_bytes()}]


def _seed_headers(folder: Path) -> list[Files]:
    """Returns the headers of whole models over tensors without values, because only headers are read."""
    folder.mkdir(parents=True)
    names = {
        "component": read_header(BASE / "unet" / "diffusion_pytorch_model.safetensors")[0],
        "text": read_header(BASE / "text_encoder" / "model.safetensors")[0],
    }
    original = {
        "sd": ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"),
        "flux": ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"),
        "sd3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"),
        "scaled": ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.scale_weight"),
        "packed": ("a.weight", "a.weight.absmax", "a.weight.quant_map", "a.weight.quant_state.bitsandbytes__nf4"),
    }
    seeds = []
    for label, header in [*names.items(), *((key, dict.fromkeys(entry)) for key, entry in original.items())]:
        tensors: dict[str, Tensor] = {}
        for name in list(header)[:60]:
            dims = len(header[name]["shape"]) if header[name] else 2
            tensors[name] = torch.zeros((2,) * dims, dtype=torch.uint8 if ".quant_state" in name else torch.float16)
        write_safetensors(folder / label, tensors, {"format": "pt", "modelspec.architecture": "stable-diffusion-v1"})
        seeds.append({"model.safetensors": (folder / label).read_bytes()})
        if is_checkpoint(folder / label):
            with suppress(EngineError):  # imports model classes, which takes seconds and follows from no input
                inspect_checkpoint(folder / label)
    return seeds


def same_tokens(first: Sequence[Embedding], second: Sequence[Embedding]) -> bool:
    """Returns True if both hold the same tokens with the same vectors."""
    return list(first) == list(second)


def _path_of(folder: Path) -> Path:
    files = list(folder.iterdir())
    return files[0] if len(files) == 1 and files[0].is_file() else folder


def _choice(folder: Path, values: Sequence[Any]) -> Any:
    """Returns one of the values, the same one for the same bytes of an input."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return Random(digest.hexdigest()).choice(values)


def check_adapter(folder: Path, output: Path) -> None:
    """Reads an adapter, writes it in the format of the store and in another one, and reads both again."""
    path = _path_of(folder)
    bundle = read_bundle(path)
    described = inspect(path)
    assert json.dumps(described, allow_nan=False)
    own = output / "own.safetensors"
    try:
        write_adapter(own, bundle.adapter, card=bundle.card, embeddings=bundle.embeddings)
    except EngineError as error:
        raise AssertionError(f"an accepted adapter cannot be stored: {error}") from error
    again = _reread(own, "loraline")
    assert again.adapter == bundle.adapter, "the stored adapter differs"
    assert same_tokens(again.embeddings, bundle.embeddings), "the stored tokens differ"
    assert again.card == bundle.card, f"the stored card differs: {again.card!r}, not {bundle.card!r}"
    if bundle.adapter.modules:
        _check_export(_choice(folder, sorted(written_formats())), bundle, output)


def _check_export(name: str, bundle: Bundle, output: Path) -> None:
    """Checks that an export can be read, and is equal if the format says so."""
    form = written_formats()[name]
    if form.numbers_modules:
        return
    path = output / "export" / ("" if form.is_folder else "export.safetensors")
    try:
        write_adapter(path, bundle.adapter, format=name, card=bundle.card, embeddings=bundle.embeddings)
    except EngineError:
        assert not any(file.is_file() for file in (output / "export").rglob("*")), f"{name}: a part is written"
        return
    again = _reread(path, name)
    assert set(again.adapter.modules) == set(bundle.adapter.modules), f"{name}: other modules"
    if codecs[name].is_lossless(bundle.adapter):
        for module, delta in bundle.adapter.modules.items():
            pair = (again.adapter.modules[module], delta)
            assert pair[0].kind == pair[1].kind, f"{name}: another kind of {module}"
            assert all(torch.equal(value, pair[0].factors()[key]) for key, value in delta.factors().items()), (
                f"{name}: other factors of {module}"
            )


def _reread(path: Path, name: str) -> Bundle:
    try:
        return read_bundle(path)
    except EngineError as error:
        raise AssertionError(f"{name}: what was written is refused: {error}") from error


def check_embeddings(folder: Path, output: Path) -> None:
    """Reads embeddings, writes them in each form, and reads them again."""
    embeddings = read_embeddings(_path_of(folder))
    for form in ("kohya", "diffusers"):
        try:
            write_embeddings(output / form, embeddings, form)
        except EngineError:
            continue
        try:
            again = read_embeddings(output / form)
        except EngineError as error:
            raise AssertionError(f"{form}: what was written is refused: {error}") from error
        assert same_tokens(again, embeddings), f"{form}: other tokens"


def check_header(folder: Path, output: Path) -> None:
    """Reads a header, its card and its family, and describes the file as a model if it is one."""
    path = _path_of(folder)
    tensors, metadata = read_header(path)
    read_card(metadata)
    families_of_tensors(tensors)
    if is_checkpoint(path):
        assert json.dumps(inspect_checkpoint(path), allow_nan=False)


WEIGHTS = (
    Target("adapters", _seed_adapters, check_adapter, 3.0),
    Target("folders", _seed_folders, check_adapter, 2.0),
    Target("embeddings", _seed_embeddings, check_embeddings, 1.0),
    Target("headers", _seed_headers, check_header, 1.5),
)
"""Targets of files with weights."""
