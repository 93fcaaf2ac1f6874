"""Measures processor time against size for every reader of what others wrote; n log n is expected.

    python -m benchmarks.reading [--most 1.3] [NAME ...]

Each reader gets inputs of sizes n, 2n, 4n and 8n that are bad for it. The exponent is the logarithm of the growth of
the time over the last factor 4: 1 is linear, 2 quadratic. The exit code is 1 if one is above `--most`.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from lora_engine.adapters.select import select_modules
from lora_engine.data.consent import read_consent
from lora_engine.data.text_files import clean_text
from lora_engine.documents import parse_json, read_document
from lora_engine.errors import EngineError, WordedError
from lora_engine.formats import inspect, read_bundle, write_adapter
from lora_engine.formats.safetensors_io import read_header, serialize
from lora_engine.inference.prompts.editing import texts_by_step
from lora_engine.inference.prompts.emphasis import parse_weights
from lora_engine.inference.prompts.tags import parse_tags
from lora_engine.merging.weights import weights_by_module
from registry.policy.licenses import read_licenses
from registry.store.redaction import redact

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


READERS: Mapping[str, tuple[int, Callable[[int, Path], Work]]] = {
    "open brackets of a prompt": (4000, lambda n, _: lambda: parse_weights("(a" * 99 + "b:1)" * n)),
    "closed brackets of a prompt": (4000, lambda n, _: lambda: parse_weights("(a:1.2)" * n)),
    "digits in a prompt": (20000, lambda n, _: lambda: parse_weights("(a:" + "9" * n)),
    "pieces of a prompt": (10000, lambda n, _: lambda: parse_weights("a:" * n)),
    "tags of a prompt": (5000, lambda n, _: lambda: parse_tags("<lora:a:1> " * n)),
    "open tags of a prompt": (20000, lambda n, _: lambda: parse_tags("<lora:" * n)),
    "edits of a prompt": (4000, lambda n, _: lambda: texts_by_step("[a:b:0.5]" * n, 20)),
    "nested edits of a prompt": (400, lambda n, _: lambda: texts_by_step(("[a:" * 90 + "b" + ":2]" * 90) * n, 20)),
    "open edits of a prompt": (4000, lambda n, _: lambda: texts_by_step("[a|" * 90 + "b:" * n, 20)),
    "caption": (20000, lambda n, _: lambda: clean_text("a\u0301 \u202e" * n)),
    "URLs in a text": (5000, lambda n, _: lambda: redact("a://u:" * n)),
    "dashes in a text": (20000, lambda n, _: lambda: redact("-" * n)),
    "words in a text": (20000, lambda n, _: lambda: redact("a" * n)),
    "question marks in a text": (20000, lambda n, _: lambda: redact("?" * n)),
    "license expression": (5000, lambda n, _: lambda: read_licenses().terms_of_license("MIT OR " * n + "MIT", "x")),
    "values of YAML": (500, lambda n, d: _document(d, "a.yaml", "a: [" + "1, " * n + "1]")),
    "keys of YAML": (500, lambda n, d: _document(d, "b.yaml", "".join(f"k{i}: 1\n" for i in range(n)))),
    "a text of YAML": (10000, lambda n, d: _document(d, "c.yaml", "a: " + "b " * n)),
    "keys of JSON": (
        5000,
        lambda n, _: lambda: parse_json(json.dumps(dict.fromkeys(map(str, range(n)))), "x", EngineError),
    ),
    "brackets of JSON": (5000, lambda n, _: lambda: parse_json("[" * n, "x", EngineError)),
    "rows of CSV": (1000, lambda n, d: _consent(d, "".join(f"{i}.png,c\n" for i in range(n)))),
    "tensors of a header": (2000, lambda n, d: _read(read_header, _file(d, "h.safetensors", _empty_tensors(range(n))))),
    "a duplicate among tensors": (
        2000,
        lambda n, d: _read(read_header, _file(d, "d.safetensors", _empty_tensors([*range(n), 0]))),
    ),
    "modules of an adapter": (200, lambda n, d: _read(read_bundle, _file(d, "a.safetensors", _lora(n)))),
    "modules of an inspection": (200, lambda n, d: _read(inspect, _file(d, "i.safetensors", _lora(n)))),
    "modules of a PEFT folder": (200, lambda n, d: _read(read_bundle, _peft(d / "peft", n))),
    "patterns of a PEFT folder": (200, lambda n, d: _read(read_bundle, _pattern_table(d / "patterns", n))),
    "modules of an export": (200, lambda n, d: _export(d, n)),
    "globs of targets": (
        200,
        lambda n, _: lambda: select_modules({_MODULE.format(i): (4, 4) for i in range(n)}, "*q*q*q"),
    ),
    "patterns of a merge": (
        50,
        lambda n, _: lambda: weights_by_module({"unet.*.to_q": 1.0}, [_MODULE.format(i) for i in range(n)]),
    ),
}
"""What grows -> the smallest size, and a function of size and folder that returns the work."""


def _document(folder: Path, name: str, text: str) -> Work:
    path = _file(folder, name, text.encode())
    return lambda: read_document(path, EngineError, allowed="a mapping")


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
        first, prepare = READERS[name]
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
