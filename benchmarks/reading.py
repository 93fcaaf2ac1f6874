"""Measures processor time against size for every reader of what others wrote; n log n is expected.

    python -m benchmarks.reading [--most 1.3] [NAME ...]

Each reader gets inputs of sizes n, 2n, 4n and 8n that are bad for it. The exponent is the logarithm of the growth of
the time over the last factor 4: 1 is linear, 2 quadratic. The exit code is 1 if one is above `--most`.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import shutil
import struct
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flows.coming_from.read import read_source
from flows.spec import load_spec
from flows.sweep_file import load_sweep
from lora_engine.adapters.select import select_modules
from lora_engine.bases.tiny import WEIGHTS
from lora_engine.data.consent import read_consent
from lora_engine.data.evidence import read_evidence
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import IngestSettings
from lora_engine.data.text_files import clean_text
from lora_engine.documents import parse_json, read_document
from lora_engine.errors import EngineError, WordedError
from lora_engine.evaluation.prompts import read_prompts
from lora_engine.families.layout import read_layout
from lora_engine.formats import inspect, read_bundle, write_adapter
from lora_engine.formats.embedding_files import read_embeddings, write_embeddings
from lora_engine.formats.embeddings import FIRST, Embedding
from lora_engine.formats.safetensors_io import read_header, serialize
from lora_engine.inference.image_files import read_used_adapters
from lora_engine.inference.infotext import Infotext
from lora_engine.inference.prompts.editing import texts_by_step
from lora_engine.inference.prompts.emphasis import parse_weights
from lora_engine.inference.prompts.foreign import check_foreign
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.prompts.tags import parse_tags
from lora_engine.inference.regions import parse_region
from lora_engine.merging.weights import weights_by_module
from registry.documents.bundle import parse_bundle
from registry.home import Home
from registry.maintenance.archive import pack_archive, unpack_archive
from registry.maintenance.fsck import fsck
from registry.policy.licenses import read_licenses
from registry.store.redaction import redact
from registry.versions.versions import Versions
from tasks.operations.ballots import read_answers
from tasks.operations.delivery_file import read_delivery

ROOT = Path(__file__).resolve().parents[1]
Work = Callable[[], object]
_MODULE = "unet.down_blocks.{}.attentions.0.transformer_blocks.0.attn1.to_q"


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _lora(count: int, name: str = _MODULE, prefix: str = "", up: str = "lora_up", down: str = "lora_down") -> bytes:
    tensors = {}
    for number in range(count):
        module = prefix + name.format(number)
        tensors |= {f"{module}.{down}.weight": torch.ones(1, 2), f"{module}.{up}.weight": torch.ones(2, 1)}
    return b"".join(bytes(part) for part in serialize(tensors, {"loraline.base": "sd"}))


def _header(entries: str) -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode()


def _peft(folder: Path, count: int, **settings: object) -> Path:
    name = _MODULE.removeprefix("unet.")
    weights = _lora(count, name, "base_model.model.", "lora_B", "lora_A")
    _file(folder, "adapter_model.safetensors", weights)
    config = {"peft_type": "LORA", "lora_alpha": 1, **settings}
    return _file(folder, "adapter_config.json", json.dumps(config).encode()).parent


def _pattern_table(folder: Path, count: int) -> Path:
    name = _MODULE.removeprefix("unet.")
    return _peft(folder, count, alpha_pattern={f"^{name.format(n)}": n + 1 for n in reversed(range(count))})


def _empty_tensors(numbers: Iterable[int]) -> bytes:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return _header("{" + ",".join(f'"t{n}":{entry}' for n in numbers) + "}")


READERS: Mapping[str, tuple[str, int, Callable[[int, Path], Work]]] = {
    "open brackets of a prompt": ("prompts", 4000, lambda n, _: lambda: parse_weights("(a" * 99 + "b:1)" * n)),
    "closed brackets of a prompt": ("prompts", 4000, lambda n, _: lambda: parse_weights("(a:1.2)" * n)),
    "digits in a prompt": ("prompts", 20000, lambda n, _: lambda: parse_weights("(a:" + "9" * n)),
    "pieces of a prompt": ("prompts", 10000, lambda n, _: lambda: parse_weights("a:" * n)),
    "tags of a prompt": ("prompts", 5000, lambda n, _: lambda: parse_tags("<lora:a:1> " * n)),
    "open tags of a prompt": ("prompts", 20000, lambda n, _: lambda: parse_tags("<lora:" * n)),
    "edits of a prompt": ("prompts", 4000, lambda n, _: lambda: texts_by_step("[a:b:0.5]" * n, 20)),
    "nested edits of a prompt": (
        "prompts",
        400,
        lambda n, _: lambda: texts_by_step(("[a:" * 90 + "b" + ":2]" * 90) * n, 20),
    ),
    "spaces of a prompt": ("prompts", 4000, lambda n, _: lambda: parse_prompt("a" + " " * n + "!")),
    "weights of another program in a prompt": ("prompts", 1000, lambda n, _: lambda: check_foreign(" 1::a:" * n + "]")),
    "spaces of an infotext": ("infotexts", 4000, lambda n, _: lambda: Infotext.parse("a" + " " * n + "!")),
    "pairs of an infotext": ("infotexts", 4000, lambda n, _: lambda: Infotext.parse('a: "b", ' * n)),
    "region": ("regions", 4000, lambda n, _: lambda: parse_region("0," * n + "=a")),
    "open edits of a prompt": ("prompts", 4000, lambda n, _: lambda: texts_by_step("[a|" * 90 + "b:" * n, 20)),
    "caption": ("captions", 20000, lambda n, _: lambda: clean_text("a\u0301 \u202e" * n)),
    "URLs in a text": ("set", 5000, lambda n, _: lambda: redact("a://u:" * n)),
    "dashes in a text": ("set", 20000, lambda n, _: lambda: redact("-" * n)),
    "words in a text": ("set", 20000, lambda n, _: lambda: redact("a" * n)),
    "question marks in a text": ("set", 20000, lambda n, _: lambda: redact("?" * n)),
    "license expression": (
        "expressions",
        5000,
        lambda n, _: lambda: read_licenses().terms_of_license("MIT OR " * n + "MIT", "x"),
    ),
    "values of YAML": ("pipelines", 500, lambda n, d: _document(d, "a.yaml", "a: [" + "1, " * n + "1]")),
    "keys of YAML": ("policies", 500, lambda n, d: _document(d, "b.yaml", "".join(f"k{i}: 1\n" for i in range(n)))),
    "a text of YAML": ("home-settings", 10000, lambda n, d: _document(d, "c.yaml", "a: " + "b " * n)),
    "keys of JSON": (
        "manifests",
        5000,
        lambda n, _: lambda: parse_json(json.dumps(dict.fromkeys(map(str, range(n)))), "x", EngineError),
    ),
    "open strings of JSON": (
        "indices",
        4000,
        lambda n, _: lambda: parse_json('"\\ud800' + '\\"' * n, "x", EngineError),
    ),
    "brackets of JSON": ("indices", 5000, lambda n, _: lambda: parse_json("[" * n, "x", EngineError)),
    "steps of a pipeline": ("pipelines", 40, lambda n, d: _pipeline(d, n)),
    "values of a sweep": ("sweeps", 20, lambda n, d: _sweep(d, n)),
    "targets of a delivery": ("deliveries", 100, lambda n, d: _delivery(d, n)),
    "licenses of a home": ("licenses", 100, lambda n, d: _licenses(d, n)),
    "images of a manifest": ("manifests", 100, lambda n, d: _manifest(d, n)),
    "tensors of an index": ("indices", 1000, lambda n, d: _index(d, n)),
    "words of a script": ("trainers", 1000, lambda n, d: _script(d, "train.py " + "--a b " * n)),
    "one word of a script": ("trainers", 4000, lambda n, d: _script(d, "train" * n)),
    "variables of a script": ("trainers", 500, lambda n, d: _script(d, f"A={'a' * 500}\n" + "B=$A\n" * n)),
    "rows of a ballot": (
        "ballots",
        1000,
        lambda n, d: _read(
            lambda path: read_answers(path, n),
            _file(d, "ballot.csv", b"pair,vote\n" + b"".join(b"%d,left\n" % (i + 1) for i in range(n))),
        ),
    ),
    "files of a signature": ("signed", 1000, lambda n, _: _bundle(n)),
    "lines of prompts": ("prompt-files", 100, lambda n, d: _read(read_prompts, _file(d, "p.txt", b"a zorb\n" * n))),
    "texts of a PNG": ("images", 500, lambda n, d: _png(d, n)),
    "opened generation records of an image": ("images", 4000, lambda n, d: _record(d, n)),
    "images of a dataset": ("datasets", 20, lambda n, d: _dataset(d, n)),
    "lines of a caption file": (
        "datasets",
        200,
        lambda n, d: _jsonl(d, b"".join(b'{"file_name": "%d.png", "text": "a"}\n' % i for i in range(n))),
    ),
    "members of an archive": ("archives", 200, lambda n, d: _archive(d, n)),
    "versions of a home": ("rows", 20, lambda n, d: _home(d, n)),
    "vectors of an embedding": ("embeddings", 500, lambda n, d: _embedding(d, n)),
    "rows of CSV": ("consent", 1000, lambda n, d: _consent(d, "".join(f"{i}.png,c\n" for i in range(n)))),
    "tensors of a header": (
        "headers",
        2000,
        lambda n, d: _read(read_header, _file(d, "h.safetensors", _empty_tensors(range(n)))),
    ),
    "a duplicate among tensors": (
        "headers",
        2000,
        lambda n, d: _read(read_header, _file(d, "d.safetensors", _empty_tensors([*range(n), 0]))),
    ),
    "modules of an adapter": ("adapters", 200, lambda n, d: _read(read_bundle, _file(d, "a.safetensors", _lora(n)))),
    "modules of an inspection": ("adapters", 200, lambda n, d: _read(inspect, _file(d, "i.safetensors", _lora(n)))),
    "modules of a PEFT folder": ("folders", 200, lambda n, d: _read(read_bundle, _peft(d / "peft", n))),
    "patterns of a PEFT folder": ("folders", 200, lambda n, d: _read(read_bundle, _pattern_table(d / "patterns", n))),
    "modules of an export": ("adapters", 200, lambda n, d: _export(d, n)),
    "globs of targets": (
        "patterns",
        200,
        lambda n, _: lambda: select_modules({_MODULE.format(i): (4, 4) for i in range(n)}, "*q*q*q"),
    ),
    "patterns of a merge": (
        "patterns",
        50,
        lambda n, _: lambda: weights_by_module({"unet.*.to_q": 1.0}, [_MODULE.format(i) for i in range(n)]),
    ),
}
"""What grows -> the fuzzed target that reads it, the smallest size, and a function of size and folder to the work."""


def _document(folder: Path, name: str, text: str) -> Work:
    path = _file(folder, name, text.encode())
    return lambda: read_document(path, EngineError, allowed="a mapping")


def _pipeline(folder: Path, count: int) -> Work:
    steps = "".join(f"  s{i}: {{uses: merge, adapters: [x@1, y@1]}}\n" for i in range(count))
    path = _file(folder, "line.yaml", f"name: a\nbase: tiny\nsteps:\n{steps}".encode())
    return lambda: load_spec(path)


def _sweep(folder: Path, count: int) -> Work:
    text = (ROOT / "examples" / "zorb" / "sweep.yaml").read_text()
    text = text.replace("[2, 4, 8, 16]", str(list(range(1, count + 1))))
    (folder / "images").mkdir()
    path = _file(folder, "line.yaml", text.encode())
    return lambda: load_sweep(path)


def _delivery(folder: Path, count: int) -> Work:
    targets = "".join(f"  - {{name: t{i}, to: a, layout: comfyui}}\n" for i in range(count))
    _file(folder, "delivery.yaml", f"targets:\n{targets}".encode())
    return lambda: read_delivery(Home(folder))


def _licenses(folder: Path, count: int) -> Work:
    entries = "".join(f"  - {{id: LicenseRef-{i}, permissions: [commercial]}}\n" for i in range(count))
    _file(folder, "licenses.yaml", f"date: 2026-11-01\nlicenses:\n{entries}".encode())
    return lambda: read_licenses(folder).terms_of_license("MIT AND LicenseRef-0", "x")


def _manifest(folder: Path, count: int) -> Work:
    images = folder / "images"
    images.mkdir()
    Image.new("RGB", (4, 4)).save(images / "0.png")
    ingest(images, folder / "dataset", IngestSettings())
    path = folder / "dataset" / "manifest.json"
    content = json.loads(path.read_bytes())
    (first,) = content["pictures"]
    content["pictures"] = [first | {"sha256": f"{i:064x}", "source": f"{i}.png"} for i in range(count)]
    path.write_text(json.dumps(content))
    return lambda: Manifest.load(folder / "dataset")


def _index(folder: Path, count: int) -> Work:
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    table = json.dumps({"metadata": {}, "weight_map": {f"t{i}": shard for i in range(count)}})
    shutil.copytree(WEIGHTS, folder / "model")
    (folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "model" / "unet" / shard)
    _file(folder / "model" / "unet", "diffusion_pytorch_model.safetensors.index.json", table.encode())
    return lambda: read_layout(folder / "model")


def _script(folder: Path, text: str) -> Work:
    path = _file(folder, "run.sh", text.encode())
    return lambda: read_source(path)


def _bundle(count: int) -> Work:
    resources = [{"algorithm": "sha256", "name": f"f{i}", "digest": "0" * 64} for i in range(count)]
    statement = {
        "subject": [{"name": "a@1"}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"resources": resources},
    }
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    envelope = {"payload": payload, "signatures": [{"sig": "AAAA"}]}
    bundle = {"verificationMaterial": {"publicKey": {"hint": "0" * 64}}, "dsseEnvelope": envelope}
    content = json.dumps(bundle).encode()
    return lambda: parse_bundle(content)


def _png(folder: Path, count: int) -> Work:
    texts = PngInfo()
    for number in range(count):
        texts.add_text(f"k{number}", "Steps: 3")
    Image.new("RGB", (4, 4)).save(folder / "a.png", pnginfo=texts)
    return lambda: read_evidence(folder / "a.png", folder)


def _record(folder: Path, count: int) -> Work:
    Image.new("RGB", (4, 4)).save(folder / "a.webp", xmp=b"<loraline:generation>" * count)
    return lambda: read_used_adapters(folder / "a.webp")


def _dataset(folder: Path, count: int) -> Work:
    (folder / "images").mkdir()
    for number in range(count):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("a zorb")
    return lambda: ingest(folder / "images", folder / f"out{time.monotonic_ns()}", IngestSettings())


def _jsonl(folder: Path, content: bytes) -> Work:
    (folder / "images").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "images" / "0.png")
    _file(folder / "images", "metadata.jsonl", content)
    return lambda: ingest(folder / "images", folder / f"out{time.monotonic_ns()}", IngestSettings())


def _archive(folder: Path, count: int) -> Work:
    for number in range(count):
        _file(folder / "in", str(number), b"x")
    pack_archive(folder / "in", folder / "a.tar")
    return lambda: unpack_archive(folder / "a.tar", folder / f"out{time.monotonic_ns()}")


def _home(folder: Path, count: int) -> Work:
    home = Home.open(folder / "home")
    with closing(Versions(home)) as versions, unittest.mock.patch("registry.versions.versions.sync_mlflow"):
        for number in range(count):
            artifact = versions.store.put_files("adapter", {"adapter.safetensors": b"%d" % number})
            versions.register("zorb", artifact, parents=["base:tiny"])
    return lambda: fsck(home, mlflow=False)


def _embedding(folder: Path, count: int) -> Work:
    write_embeddings(folder / "e", [Embedding("zorb", {FIRST: torch.ones(count, 4)})])
    return lambda: read_embeddings(folder / "e")


def _consent(folder: Path, rows: str) -> Work:
    path = _file(folder, "consent.csv", b"file,consent\n" + rows.encode())
    return lambda: read_consent(path)


def _read(reader: Callable[[Path], object], path: Path) -> Work:
    return lambda: reader(path)


def _export(folder: Path, count: int) -> Work:
    adapter = read_bundle(_file(folder, "e.safetensors", _lora(count))).adapter
    return lambda: write_adapter(folder / "out", adapter, format="peft")


def seconds_of(work: Work) -> float:
    """Returns the least processor time of three runs; a refusal is a result, too."""
    times = []
    for _ in range(3):
        began = time.process_time()
        with suppress(WordedError):
            work()
        times.append(time.process_time() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="Readers; all of them by default.")
    parser.add_argument("--most", type=float, default=1.3, help="Largest exponent.")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.names or READERS:
        _, first, prepare = READERS[name]
        times = []
        for factor in (1, 2, 4, 8):
            with tempfile.TemporaryDirectory() as folder:
                times.append(seconds_of(prepare(first * factor, Path(folder))))
        # Below a millisecond, constant parts and the clock decide.
        exponent = math.log(times[3] / times[1], 4) if times[3] > 1e-3 else 0.0
        print(
            f"{name:32} n {first:6}: {' '.join(f'{1000 * each:8.1f}' for each in times)} ms, exponent {exponent:.2f}",
            flush=True,
        )
        failed += [name] if exponent > arguments.most else []
    raise SystemExit(f"above {arguments.most}: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
