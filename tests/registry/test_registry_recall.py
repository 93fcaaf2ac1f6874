"""Tests revocations of versions, artifacts, files, bases and digests that nothing has."""

import json

import pytest

from lora_engine.files import sha256_bytes
from registry.entities import Execution, Subject, now
from registry.errors import Refused, RightsError
from registry.lineage.content import record_content
from registry.policy.revocations import read_revoked
from registry.versions.promotion import promote, read_log
from registry.versions.revocation import lift, revoke

IMAGE = {"width": 4, "height": 4, "caption": "", "file": "pictures/0000000000000000.png", "source": "a.png"}
ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def family(versions, from_images):
    """Returns a version, its child by a step, one that names its file, and an unrelated one."""
    first = from_images(b"1", {ONE: "C-1"}, name="first")
    child = from_images(b"2", name="child", adapters=[first])
    by_file = from_images(b"3", name="named", parents=[f"first sha256:{first.sha256}"])
    return first, child, by_file, from_images(b"4", {TWO: "C-2"}, name="other")


def test_a_version_an_artifact_and_a_file_are_recalled_with_everything_made_from_them(versions, family):
    first, child, by_file, other = family
    expected = {first.ref, child.ref, by_file.ref}
    names = {"version": first.ref, "artifact": first.artifact.sha256, "file": first.sha256}
    for kind, text in names.items():
        report = revoke(versions, text, reason="r", dry_run=True)
        assert (report.kind, report.subject, set(report.versions)) == (kind, text, expected)
        assert report.merges == (child.ref,)
    assert revoke(versions, child.ref, reason="r", dry_run=True).versions == (child.ref,)
    assert revoke(versions, first.sha256[:12], reason="r", dry_run=True).kind == "file"
    revoke(versions, first.ref, reason="r", policy="withdraw")
    assert {version.ref for version in versions.list() if version.state == "WITHDRAWN"} == expected
    assert promote(versions, other.name, 1, "canary", reason="r").after == 1
    assert set(lift(versions, first.ref, reason="r").details["restored"]) == expected


def test_the_reason_of_a_refused_promotion_names_what_was_revoked(versions, family):
    first = family[0]
    for text, name in ((first.ref, "version first@1"), (first.sha256, f"file {first.sha256[:12]}")):
        revoke(versions, text, reason="r")
        with pytest.raises(Refused, match=f"{name} was revoked"):
            promote(versions, "child", 1, "canary", reason="r")
        lift(versions, text, reason="r")
    assert promote(versions, "child", 1, "canary", reason="r").after == 1


def test_content_is_found_by_the_digest_that_survives_formats(versions, family):
    first = family[0]
    with versions.lineage.database.write() as session:
        record_content(session, first.artifact, {"d" * 64: "deltas"}, None)
    report = revoke(versions, "d" * 64, reason="r")
    assert (report.kind, first.ref in report.versions) == ("file", True)
    with pytest.raises(Refused, match="file dddddddddddd was revoked"):
        promote(versions, "child", 1, "canary", reason="r")


def train_on(versions, name, content, label, fingerprint=None):
    """Registers an adapter that was trained on a base."""
    run = versions.lineage.start_run(name, {})
    adapter = versions.store.put_files("adapter", {"adapter.safetensors": content})
    base = {"label": label} | ({"fingerprint": fingerprint} if fingerprint else {})
    settings = {"settings": {"base": label}, "base": base}
    step = Execution(run.id, run.id, name, "train", "1", run.id, settings, {}, adapter, started_at=now())
    versions.lineage.log_execution(step, contents=versions.store.files(adapter))
    return versions.register(name, adapter, run_id=run.id)


def test_a_base_is_recalled_by_name_revision_or_fingerprint(versions):
    train_on(versions, "old", b"1", "us/base@aaa", ONE)
    train_on(versions, "new", b"2", "us/base@bbb", TWO)
    train_on(versions, "copy", b"3", "my-folder", ONE)
    train_on(versions, "other", b"4", "us/other@aaa", "3" * 64)
    affected = {
        "us/base@aaa": {"old@1", "copy@1"},
        "us/base": {"old@1", "copy@1", "new@1"},
        ONE: {"old@1", "copy@1"},
        "my-folder": {"old@1", "copy@1"},
    }
    for text, refs in affected.items():
        report = revoke(versions, text, reason="r", dry_run=True)
        assert (report.kind, set(report.versions)) == ("base", refs), text
    revoke(versions, "us/base@bbb", reason="r")
    with pytest.raises(Refused, match="base 'us/base@bbb' was revoked"):
        promote(versions, "new", 1, "canary", reason="r")
    assert promote(versions, "old", 1, "canary", reason="r").after == 1
    train_on(versions, "their", b"5", "my-folder", TWO)
    with pytest.raises(RightsError, match="several bases are called 'my-folder'"):
        revoke(versions, "my-folder", reason="r")


def test_a_digest_that_nothing_has_is_blocked_and_called_nothing_else(versions, from_images):
    version = from_images(b"1", {ONE: "C-1"})
    late = from_images(b"2", name="late")
    report = revoke(versions, "sha256:" + "F" * 64, reason="r")
    assert (report.kind, report.subject, report.versions, report.pictures) == ("digest", "f" * 64, (), ())
    assert read_revoked(versions.lineage) == {"f" * 64: "digest ffffffffffff"}
    assert promote(versions, version.name, 1, "canary", reason="r").after == 1
    with versions.lineage.database.write() as session:  # it turns out to be the content of a version
        record_content(session, late.artifact, {"f" * 64: "deltas"}, None)
    with pytest.raises(Refused, match="digest ffffffffffff was revoked"):
        promote(versions, "late", 1, "canary", reason="r")
    lift(versions, "sha256:" + "F" * 8, reason="r")
    assert read_revoked(versions.lineage) == {}
    for text in ("first@9", "no-such-thing", "abc123"):
        with pytest.raises(RightsError, match="nothing matches"):
            revoke(versions, text, reason="r")
    with pytest.raises(RightsError, match="no version '9'"):
        revoke(versions, "late@9", reason="r")


def test_an_image_and_a_consent_of_one_id_are_both_kept(versions):
    run = versions.lineage.start_run("x", {})
    manifest = json.dumps({"pictures": [IMAGE | {"sha256": ONE, "consent": ONE}]}).encode()
    dataset = versions.store.put_files("manifest", {"manifest.json": manifest})
    subjects = [Subject(ONE, "caption", "c"), Subject(ONE, "picture", "p"), Subject(ONE, "consent", "c")]
    step = Execution("i", run.id, "i", "ingest", "1", "k", output=dataset, started_at=now())
    versions.lineage.log_execution(step, subjects=subjects)
    assert revoke(versions, ONE, reason="r", dry_run=True).kind == "consent"
    with versions.lineage.database.read() as session:
        rows = session.connection().exec_driver_sql("SELECT kind FROM subjects ORDER BY kind").all()
    assert [kind for (kind,) in rows] == ["caption", "consent", "picture"]


def test_a_consent_whose_dataset_cannot_be_read_says_that_its_images_are_unknown(versions, from_images):
    version = from_images(b"1", {ONE: "C-1"})
    (dataset,) = [ref for step in versions.lineage.executions(version.run_id) for ref in step.inputs.values()][:1]
    assert revoke(versions, "C-1", reason="r", dry_run=True).unreadable == ()
    versions.store.blobs.path(versions.store.files(dataset)["manifest.json"].sha256).unlink()
    report = revoke(versions, "C-1", reason="r")
    assert (report.unreadable, report.pictures, report.versions) == ((dataset.sha256,), (), (version.ref,))
    assert read_log(versions)[-2].details["unreadable"] == [dataset.sha256]


@pytest.mark.parametrize(("policy", "state"), [("flag", "ACTIVE"), ("withdraw", "WITHDRAWN")])
def test_what_is_registered_after_a_revocation_gets_what_the_others_got(versions, from_images, policy, state):
    first = from_images(b"1", {ONE: "C-1"})
    revoke(versions, first.ref, reason="asked", policy=policy)
    late = from_images(b"2", name="late", adapters=[first], alias_request="staging")
    assert (late.state, late.aliases) == (state, ())
    event = next(event for event in read_log(versions) if event.name == "late")
    assert event.action == {"flag": "flag", "withdraw": "withdraw"}[policy]
    assert event.details["revocation"] == next(e.seq for e in read_log(versions) if e.action == "revoke")
    assert from_images(b"3", {TWO: "C-2"}, name="clean").state == "ACTIVE"
    lift(versions, first.ref, reason="r")
    assert versions.show("late", 1).state == "ACTIVE"


def test_versions_that_claim_each_other_as_parents_are_recalled_together(versions, from_images):
    digests = [sha256_bytes(content) for content in (b"1", b"2")]
    first = from_images(b"1", {ONE: "C-1"}, name="first", parents=[f"x sha256:{digests[1]}"])
    second = from_images(b"2", {TWO: "C-2"}, name="second", parents=[f"x sha256:{digests[0]}"])
    for text in (first.ref, second.ref, "C-1", "C-2", *digests):
        assert revoke(versions, text, reason="r", dry_run=True).versions == (first.ref, second.ref), text
    revoke(versions, "C-2", reason="r")
    with pytest.raises(Refused, match="consent 'C-2' was revoked"):
        promote(versions, "first", 1, "canary", reason="r")
