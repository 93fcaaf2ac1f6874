"""Odd images, captions, layouts and archives, each with what becomes of it; `test_corpus` ingests every one."""

from __future__ import annotations

from tests.lora_engine.data.corpus.archives import ARCHIVES
from tests.lora_engine.data.corpus.build import Case
from tests.lora_engine.data.corpus.captions import CAPTIONS
from tests.lora_engine.data.corpus.images import IMAGES
from tests.lora_engine.data.corpus.layouts import LAYOUTS
from tests.lora_engine.data.corpus.refused import REFUSED

TABLES = {
    "images": IMAGES,
    "captions": CAPTIONS,
    "layouts": LAYOUTS,
    "archives": ARCHIVES,
    "refused": REFUSED,
}
CASES: dict[str, Case] = {f"{table}: {name}": case for table, cases in TABLES.items() for name, case in cases.items()}
