"""`from registry import Registry`, as the package's docstring shows it."""

import hashlib
import re

import pytest

from registry import Conflict, Refused, Registry, RegistryError, UnknownName


@pytest.fixture
def reg(tmp_path):
    home = tmp_path / "home"
    with Registry.open(str(home)) as opened:
        yield opened


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "zorb.safetensors"
    path.write_bytes(b"weights")
    return path


def test_a_registered_file_is_read_back_verified_and_copied_out(reg, file, tmp_path):
    version = reg.register("zorb", str(file), license="MIT", card={"trigger": "zorb"})
    assert version.ref == "zorb@1"
    assert version.card == {"trigger": "zorb", "license": "MIT"}
    assert reg["zorb"].read() == reg["zorb@1"].read() == b"weights"
    assert version.checkout(str(tmp_path / "copy.safetensors")).read_bytes() == b"weights"
    assert repr(version) == f"<RegisteredVersion zorb@1 sha256:{hashlib.sha256(b'weights').hexdigest()[:12]}>"
    assert [each.ref for each in reg] == ["zorb@1"]
    assert "1 versions" in repr(reg)
    assert reg.register("zorb", file, license="MIT").ref == "zorb@1", "the same bytes keep their number"


def test_a_promotion_follows_the_policy_and_is_in_the_history(reg, file):
    version = reg.register("zorb", file, license="MIT")
    with pytest.raises(Refused) as refused:
        reg.promote(version, "production", reason="looks right")
    assert refused.value.reasons
    tried = reg.promote(version, "trial", reason="looks right")
    assert tried.version.aliases == ("trial",)
    assert reg["zorb@trial"].ref == "zorb@1"
    second = file.with_name("second.safetensors")
    second.write_bytes(b"others")
    reg.promote(reg.register("zorb", second, license="MIT"), "trial", reason="better")
    assert reg["zorb@trial"].ref == "zorb@2"
    with pytest.raises(Conflict, match="zorb@2"):
        reg.promote("zorb@trial", "canary", reason="reviewed", expect=version.version.sha256)
    assert reg.promote("zorb@trial", "canary", reason="reviewed", expect=2).version.aliases == ("canary", "trial")
    back = reg.rollback("zorb", "trial", reason="worse")
    assert back is not None
    assert back.ref == "zorb@1"
    assert [event.action for event in reg.history("zorb", "trial")] == ["promote", "promote", "rollback"]
    reg.withdraw("zorb@2", reason="rights")
    with pytest.raises(RegistryError, match="rights"):
        reg["zorb@2"].read()


def test_lineage_is_a_mermaid_flowchart_with_every_node_and_edge_and_no_markup_of_its_labels(reg, file):
    parent = reg.register("zorb", file, license="MIT")
    child = file.with_name("child.safetensors")
    child.write_bytes(b"child")
    merged = reg.register("merged", child, license="MIT", parents=[parent.ref, 'a "name"; with <b>markup</b>'])
    walk = merged.lineage()
    text = walk.to_mermaid()
    assert text.startswith("flowchart LR\n")
    assert len(re.findall(r"^  n\d+[\[({]", text, re.MULTILINE)) == len(walk.nodes)
    assert len(re.findall(r"-->", text)) == len(walk.edges)
    assert "merged@1" in text
    assert "<b>" not in text
    assert "zorb@1" in text
    assert {node.id for node in parent.lineage("down").nodes} >= {"merged@1"}


def test_a_home_that_is_not_there_and_a_name_that_is_unknown_are_errors(reg, tmp_path):
    with pytest.raises(RegistryError, match="not a Loraline home"):
        Registry.open(tmp_path / "nowhere", create=False)
    with pytest.raises(UnknownName):
        reg["nothing@1"]
