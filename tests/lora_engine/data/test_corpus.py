"""Every case of the corpus has its outcome, and every possible image is used, quarantined or skipped, once."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

import pytest

from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest, Quarantined
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError
from tests.lora_engine.data.corpus.build import Case, Skipped, Unused, Used, build
from tests.lora_engine.data.corpus.cases import CASES


def test_the_corpus_has_at_least_150_cases() -> None:
    assert len(CASES) >= 150


@pytest.fixture
def surroundings(tmp_path: Path) -> Path:
    """The parent of folder and result; whatever a case writes elsewhere would be here."""
    return tmp_path / "around" / "folder"


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_its_outcome(surroundings: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    case, out = CASES[name], surroundings / "out"
    images = build(surroundings / "images", case.files)
    if case.is_file:
        (images,) = images.iterdir()
    before = _files(surroundings)
    settings = IngestSettings.model_validate(case.settings)
    if case.error:
        with pytest.raises(DataError, match=case.error):
            ingest(images, out, settings)
        assert not (out / "manifest.json").exists()
        assert list(out.glob(".*")) == []
        assert not _files(surroundings, out) - before
        return
    with caplog.at_level(logging.WARNING):
        manifest = ingest(images, out, settings)
    _check(case, manifest)
    assert case.logged in caplog.text
    assert not _files(surroundings, out) - before
    for image in manifest.pictures:
        assert open_image(out / image.file).size == (image.width, image.height)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {"manifest.json", *(file for image in manifest.pictures for file in image.files)}


def _check(case: Case, manifest: Manifest) -> None:
    assert manifest.layout == case.layout
    found = {
        image.source: Used(
            image.caption,
            image.caption_origin,
            image.split,
            image.repeats,
            image.mask is not None,
            image.alternatives or (),
        )
        for image in manifest.pictures
    }
    assert found == {name: outcome for name, outcome in case.images.items() if isinstance(outcome, Used)}
    unused = {name: outcome.reason for name, outcome in case.images.items() if isinstance(outcome, Unused)}
    _check_reasons(manifest.quarantined, [*unused.items(), *case.faults.items()])
    skipped = {name: outcome.reason for name, outcome in case.images.items() if isinstance(outcome, Skipped)}
    _check_reasons(manifest.skipped or (), [*skipped.items()])
    # Used, quarantined and skipped images are all that the case has, each once.
    sources = Counter(item.source for item in (*manifest.pictures, *manifest.quarantined, *(manifest.skipped or ())))
    assert sources == Counter([*case.images, *case.faults])


def _check_reasons(items: tuple[Quarantined, ...], expected: list[tuple[str, str]]) -> None:
    assert sorted(item.source for item in items) == sorted(name for name, _ in expected)
    reasons = dict(expected)
    for item in items:
        assert item.source.isprintable()
        assert item.reason.isprintable()
        assert re.search(reasons[item.source], item.reason), item


def _files(folder: Path, without: Path | None = None) -> set[Path]:
    return {path for path in folder.parent.rglob("*") if without is None or not path.is_relative_to(without)}
