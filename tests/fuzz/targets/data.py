"""Targets that read images, and folders of images with captions, masks and a consent file."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_engine.data.evidence import read_evidence
from lora_engine.data.images import open_with_digest, write_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import IngestSettings
from tests.fuzz.files import Files
from tests.fuzz.target import Target
from tests.lora_engine.data.corpus.build import shard, tar, zipped

_CONSENT = b"""file,consent,owner,license,rights,person,scope,expires,revocable,source,opt_out,ai_generated
0.png,c-1,Zo,CC-BY-4.0,consent,yes,train,2027-12-31,yes,https://example.com/a,ai.txt/2026-05-01/clear,no
1.jpg,c-2,,,own,no,,,,,,
"""
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")


def _encoded(mode: str, form: str, **options: object) -> bytes:
    image, buffer = Image.linear_gradient("L").resize((9, 7)).convert(mode), io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def _seed_images(folder: Path) -> list[Files]:
    text = PngInfo()
    text.add_text("parameters", "a ring\nSteps: 20")
    text.add_itxt("prompt", '{"1": {"class_type": "x"}}', zip=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 6, {0x9286: b"ASCII\0\0\0Steps: 3"}
    seeds = [{"0.png": _encoded(mode, "PNG")} for mode in _MODES]
    seeds.append({"0.png": _encoded("RGB", "PNG", pnginfo=text, exif=exif)})
    seeds += [{"0.jpg": _encoded(mode, "JPEG", exif=exif)} for mode in ("RGB", "L", "CMYK")]
    seeds += [{"0.jpg": _encoded("RGB", "JPEG", progressive=True)}]
    seeds += [{"0.webp": _encoded(mode, "WEBP", lossless=lossless)} for mode, lossless in (("RGB", 1), ("RGBA", 0))]
    return seeds


def _seed_datasets(folder: Path) -> list[Files]:
    images = {"0.png": _encoded("RGB", "PNG"), "1.jpg": _encoded("L", "JPEG")}
    texts = {"0.txt": b"a red zorb, on the left", "1.txt": "\u00e9 zorb".encode()}
    masks = {"0.mask.png": _encoded("L", "PNG"), "masks/1.png": _encoded("L", "PNG")}
    red = b'{"file_name": "0.png", "text": "red"}'
    sets = [images | texts | {"consent.csv": _CONSENT}, images | texts | masks, {"10_zorb/0.png": images["0.png"]}]
    sets += [{"x.tar": tar(images | texts)}, {"x.tgz": tar(images | texts, "w:gz")}, {"x.zip": zipped(images | texts)}]
    sets += [
        {"train.parquet": shard(2, text=["red", "blue"])},
        {"test/0.png": images["0.png"], "train/1.jpg": images["1.jpg"]},
    ]
    return [*sets, *(images | file for file in _DATASET_FILES), images | {"metadata.jsonl": red}]


_DATASET_FILES: list[Files] = [
    {"concepts.json": b'[{"name": "x", "path": ".", "balancing": 2, "text": {"prompt_source": "filename"}}]'},
    {
        "ai-toolkit.yaml": b"trigger_word: x\ndatasets:\n"
        b"- {folder_path: ., num_repeats: 2, default_caption: 'a [trigger]'}"
    },
    {"multidatabackend.json": b'[{"id": "x", "instance_data_dir": ".", "repeats": 1, "caption_strategy": "filename"}]'},
]


def check_image(folder: Path, output: Path) -> None:
    """Decodes an image, reads its evidence, writes it and reads the same pixels."""
    (path,) = folder.iterdir()
    _, image = open_with_digest(path, 1_000_000)
    read_evidence(path, folder)
    write_image(output / "0.png", image)
    again = open_with_digest(output / "0.png")[1]
    assert again.tobytes() == image.tobytes(), "the written pixels differ"


def check_dataset(folder: Path, output: Path) -> None:
    """Ingests a folder; every image is used, quarantined or skipped, and the manifest is read as it was written."""
    consent = folder / "consent.csv"
    settings = IngestSettings(max_pixels=1_000_000, heldout=0.5, repeats="folders")
    manifest = ingest(folder, output / "dataset", settings, consent=consent if consent.is_file() else None)
    assert Manifest.load(output / "dataset") == manifest, "the manifest differs"
    assert not list(output.glob("dataset/**/.*")), "a partial file is left"


DATA = (
    Target("images", _seed_images, check_image, 2.0),
    Target("datasets", _seed_datasets, check_dataset, 1.0),
)
"""Targets of images."""
