"""Tests the list of what changed since production."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from lora_engine.files import sha256_file
from registry.home import Home
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tasks.operations.changes_since import ProductionChanges, changes_since_production
from tests.flows.commands import say
from tests.flows.conftest import PREPARE, draw_noise
from tests.flows.made import run_line

LINE = (
    PREPARE
    + """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 1, batch: 1}
  release:  {uses: register, adapter: adapter, alias: trial}
"""
)


@pytest.mark.usefixtures("trained_here")
def test_the_changes_since_production_name_images_captions_and_settings(
    pipeline: Callable[..., Path], home: Path
) -> None:
    opened, path = Home.open(home), pipeline(LINE, 4)
    images = path.parent / "images"
    run_line(path, opened)
    assert changes_since_production(opened, "try") == ProductionChanges(None, "try@1")
    with closing(Versions(opened)) as versions:
        promote(versions, "try", 1, "live", reason="sharp", actor="anna")
    (images / "0.png").unlink()
    draw_noise(images / "new.png", 99)
    say("revoke", sha256_file(images / "1.png"), "--reason", "the owner asked", home=home)
    path.write_text(LINE.replace("star", "ring").replace("rank: 2", "rank: 3"))
    assert run_line(path, opened).ref == "try@2"

    changes = changes_since_production(opened, "try", alias="live")
    assert (changes.production, changes.version) == ("try@1", "try@2")
    assert (changes.added, changes.removed, changes.revoked) == (("new.png",), ("0.png",), ("1.png",))
    assert set(changes.captions) == {"2.png", "3.png"}
    before, after = changes.captions["2.png"]
    assert ("star" in before, "ring" in after) == (True, True)
    recipe = {change.path: (change.before, change.after) for change in changes.recipe}
    assert recipe["adapter.rank"] == (2, 3)
    assert recipe["captions.class_word"] == ("star", "ring")
    assert (changes.base, changes.revisions, changes.notes) == ((), {}, ())

    text = say("diff", "try@live", "try@trial", "--changes", home=home)
    assert "images added    new.png" in text
    assert "images revoked  1.png" in text
    assert "adapter.rank: 2 -> 3" in text
    assert json.loads(say("diff", "try@live", "try@2", "--changes", "--json", home=home))["added"] == ["new.png"]
    assert say("diff", "try@2", "try@2", "--changes", home=home) == "changes  none\n"
    assert changes.to_markdown().startswith("**try@1 -> try@2**\n\n- **images added**: new.png\n")
