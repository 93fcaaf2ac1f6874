import json

import pytest

from lora_engine.files import sha256_bytes
from registry.entities import Execution, now
from registry.errors import PromotionError, Refused, RightsError
from registry.policy.revocations import read_revoked
from registry.versions import promotion
from registry.versions.projections import replay
from registry.versions.promotion import history, promote, read_log
from registry.versions.revocation import lift, revoke

GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}
IMAGE = {"width": 4, "height": 4, "caption": "", "file": "pictures/0000000000000000.png"}
COPY = {"file": "/mnt/x.safetensors", "sha256": "0" * 64}
ONE, TWO, THREE = ("1" * 64, "2" * 64, "3" * 64)


def test_a_consent_affects_every_dataset_run_version_merge_export_and_alias(versions, from_images):
    first = from_images(b"1", {ONE: "C-1", TWO: "C-2"}, promoted="production")
    # The same image in a dataset that names no consent for it.
    other = from_images(b"2", {ONE: None, THREE: "C-3"}, name="other", promoted="staging")
    clean = from_images(b"3", {THREE: "C-3"}, name="clean", promoted="production")
    merged = from_images(b"4", name="merged", adapters=[first, clean])
    versions.log_export(first, {"format": "kohya", "files": [COPY]})
    report = revoke(versions, "C-1", reason="she asked", actor="ada@lab")
    assert (report.kind, report.pictures) == ("consent", (ONE,))
    assert len(report.manifests) == 2
    assert [run["name"] for run in report.runs] == ["make zorb", "make other", "make merged"]
    assert set(report.versions) == {first.ref, other.ref, merged.ref}
    assert report.merges == (merged.ref,)
    assert report.aliases == {"zorb@production": 1, "other@staging": 1}
    assert [entry.get("version") for entry in report.exports].count(None) == 3
    assert {
        "version": "zorb@1",
        "event": 4,
        "files": [{"file": "/mnt/x.safetensors", "sha256": "0" * 64}],
    } in report.exports
    assert clean.ref not in report.versions
    flagged = [event for event in read_log(versions) if event.action == "flag"]
    assert {f"{event.name}@{event.after}" for event in flagged} == set(report.versions)
    assert all(event.details["revocation"] == report.event for event in flagged)


def test_a_revocation_reaches_what_was_made_from_the_bytes_of_a_version_that_names_an_affected_one(
    versions, from_images
):
    first = from_images(b"1", {ONE: "C-1"})
    child = from_images(b"2", name="child", parents=[first.ref])
    copy = versions.register("copy", child.artifact)
    made = from_images(b"3", name="made", adapters=[child])
    report = revoke(versions, "C-1", reason="r")
    assert set(report.versions) == {first.ref, child.ref, copy.ref, made.ref}
    for version in (child, copy, made):
        with pytest.raises(Refused, match="was revoked"):
            promote(versions, version.name, 1, "canary", reason="r")


def test_revoking_a_consent_again_keeps_the_images_of_datasets_that_cannot_be_read_now(versions, from_images):
    version = from_images(b"1", {ONE: "C-1"})
    from_images(b"2", {ONE: None}, name="other")
    assert revoke(versions, "C-1", reason="r").pictures == (ONE,)
    (dataset,) = [ref for step in versions.lineage.executions(version.run_id) for ref in step.inputs.values()][:1]
    versions.store.blobs.path(versions.store.files(dataset)["manifest.json"].sha256).unlink()
    revoke(versions, "C-1", reason="again")
    assert ONE in read_revoked(versions.lineage)
    with pytest.raises(Refused, match=r"consent 'C-1' \(image 1{12}\) was revoked"):
        promote(versions, "other", 1, "canary", reason="r")


def test_an_image_that_two_revocations_cover_names_both(versions, from_images):
    from_images(b"1", {ONE: "C-1"})
    for subject in ("C-1", ONE):
        revoke(versions, subject, reason="r")
    assert read_revoked(versions.lineage)[ONE] == f"consent 'C-1' (image {ONE[:12]}) and image {ONE[:12]}"
    lift(versions, ONE, reason="r")
    assert read_revoked(versions.lineage)[ONE] == f"consent 'C-1' (image {ONE[:12]})"


def test_an_image_is_revoked_by_its_file_its_digest_and_its_first_digits(versions, from_images, tmp_path):
    path = tmp_path / "face.png"
    path.write_bytes(b"a face")
    digest = sha256_bytes(b"a face")
    from_images(b"1", {digest: "C-1"})
    for text in (str(path), digest, digest[:10]):
        assert revoke(versions, text, reason="r", dry_run=True).versions == ("zorb@1",)
    assert read_revoked(versions.lineage) == {}


def test_a_dry_run_finds_the_same_and_writes_nothing(versions, from_images):
    from_images(b"0", {TWO: "C-2"}, promoted="production")
    from_images(b"1", {ONE: "C-1"}, promoted="production")
    before = read_log(versions)
    planned = revoke(versions, "C-1", reason="r", policy="withdraw", dry_run=True)
    assert planned.event is None
    assert read_log(versions) == before
    done = revoke(versions, "C-1", reason="r", policy="withdraw")
    assert vars(planned) | {"event": done.event} == vars(done)


def test_flagged_versions_keep_their_aliases_and_cannot_be_promoted(versions, from_images):
    from_images(b"1", {ONE: "C-1"}, promoted="production")
    revoke(versions, "C-1", reason="r")
    assert versions.show("zorb", "production").state == "ACTIVE"
    for override in (False, True):
        with pytest.raises(Refused, match="consent 'C-1' was revoked"):
            promote(versions, "zorb", 1, "canary", reason="r", override=override)
    late = from_images(b"2", {ONE: "C-9"})
    with pytest.raises(Refused, match="was revoked"):
        promote(versions, "zorb", late.version, "canary", reason="made later from the same image")
    clean = from_images(b"3", {TWO: "C-2"})
    assert promote(versions, "zorb", clean.version, "canary", reason="r").after == 3


def test_a_withdrawal_rolls_aliases_back_to_the_last_version_that_is_not_affected(versions, from_images):
    from_images(b"1", {TWO: "C-2"}, promoted="production")
    for content in (b"2", b"3"):
        from_images(content, {ONE: "C-1"}, promoted="production")
    from_images(b"4", {ONE: "C-1"}, name="alone", promoted="production")
    report = revoke(versions, ONE, reason="r", policy="withdraw")
    assert report.taken_back == {"zorb@production": 1, "alone@production": None}
    assert versions.show("zorb", "production").version == 1
    assert [version.state for version in versions.list("zorb")] == ["ACTIVE", "WITHDRAWN", "WITHDRAWN"]
    assert versions.show("alone", 1).aliases == ()
    assert replay(read_log(versions)) == {("zorb", "production"): 1}
    last = history(versions, "zorb", "production")[-1]
    assert (last.action, last.before, last.after, last.details["revocation"]) == ("rollback", 3, 1, report.event)


def test_a_withdrawal_skips_versions_that_another_revocation_affects(versions, from_images):
    from_images(b"1", {ONE: "C-1"}, promoted="production")
    from_images(b"2", {TWO: "C-2"}, promoted="production")
    from_images(b"3", {THREE: "C-3"}, promoted="production")
    revoke(versions, "C-2", reason="r", policy="flag")
    assert revoke(versions, "C-3", reason="r", policy="withdraw").taken_back == {"zorb@production": 1}


def test_the_policy_of_the_home_is_the_default_of_a_revocation(versions, from_images):
    from_images(b"1", {ONE: "C-1"}, promoted="production")
    (versions.home.path / "policy.yaml").write_text("recall: withdraw\n")
    assert revoke(versions, "C-1", reason="r").policy == "withdraw"
    assert versions.show("zorb", 1).state == "WITHDRAWN"


def test_a_withdrawal_of_an_alias_that_the_actor_may_not_move_does_nothing_at_all(versions, from_images):
    from_images(b"1", {ONE: "C-1"}, promoted="production")
    (versions.home.path / "policy.yaml").write_text("aliases: {production: {movers: [ada@lab]}}\n")
    before = read_log(versions)
    with pytest.raises(Refused, match="eve may not move zorb@production"):
        revoke(versions, "C-1", reason="r", actor="eve", policy="withdraw")
    *same, refusal = read_log(versions)
    assert same == before
    assert (refusal.action, refusal.actor, refusal.details["refused"]) == ("refuse", "eve", "revoke")
    assert read_revoked(versions.lineage) == {}
    assert revoke(versions, "C-1", reason="r", actor="eve", policy="flag").event


def test_lifting_restores_withdrawn_versions_except_those_that_another_revocation_affects(versions, from_images):
    from_images(b"1", {ONE: "C-1"})
    from_images(b"2", {ONE: "C-1", TWO: "C-2"})
    revoke(versions, "C-1", reason="r", policy="flag")
    revoke(versions, "C-1", reason="r, and for good", policy="withdraw")
    revoke(versions, "C-2", reason="r", policy="withdraw")
    event = lift(versions, "C-1", reason="a mistake", actor="ada@lab")
    assert event.details["restored"] == ["zorb@1"]
    assert [version.state for version in versions.list()] == ["ACTIVE", "WITHDRAWN"]
    assert set(read_revoked(versions.lineage)) == {"C-2", TWO}
    assert promote(versions, "zorb", 1, "canary", reason="r").after == 1
    assert lift(versions, "C-2", reason="r").details["restored"] == ["zorb@2"]
    with pytest.raises(RightsError, match="no active revocation"):
        lift(versions, "C-2", reason="again")


def test_unknown_subjects_are_refused_and_the_nearest_is_named(versions, from_images):
    from_images(b"1", {ONE: "consent-17", "1" * 63 + "2": None})
    with pytest.raises(RightsError, match="did you mean 'consent-17'"):
        revoke(versions, "consent-18", reason="r")
    with pytest.raises(RightsError, match="matches several things: image 1111"):
        revoke(versions, "1" * 8, reason="r")
    with pytest.raises(PromotionError, match="without a reason"):
        revoke(versions, "consent-17", reason="")
    unknown = revoke(versions, "f" * 64, reason="never seen here, and never shall be")
    assert (unknown.kind, unknown.versions) == ("digest", ())
    assert read_revoked(versions.lineage) == {"f" * 64: "digest ffffffffffff"}


def test_a_revocation_between_decision_and_promotion_is_seen(versions, from_images, monkeypatch):
    from_images(b"1", {ONE: "C-1"})
    evaluate_policy = promotion.evaluate_policy

    def evaluate_then_revoke(*arguments, **values):
        decision = evaluate_policy(*arguments, **values)
        revoke(versions, "C-1", reason="just now")
        return decision

    monkeypatch.setattr(promotion, "evaluate_policy", evaluate_then_revoke)
    with pytest.raises(Refused, match="was revoked"):
        promote(versions, "zorb", 1, "production", reason="r")
    assert versions.show("zorb", 1).aliases == ()


def test_expired_consent_blocks_production_only(versions, from_images):
    store, lineage = versions.store, versions.lineage
    run = lineage.start_run("x", {})
    entry = IMAGE | {"sha256": ONE, "source": "a.png", "rights": {"rights": "consent", "expires": "2020-01-01"}}
    dataset = store.put_files("manifest", {"manifest.json": json.dumps({"pictures": [entry]}).encode()})
    adapter = store.put_files("adapter", {"adapter.safetensors": b"x"})
    settings = {"settings": {"base": "tiny"}}
    training = Execution(
        run.id, run.id, "t", "train", "1", "k", settings, {"dataset": dataset}, adapter, started_at=now()
    )
    lineage.log_execution(training, contents=store.files(adapter))
    versions.register("zorb", adapter, gates=[GATE], passed=True, alias_request="staging")
    assert versions.show("zorb", "staging").version == 1
    with pytest.raises(Refused, match=r"expired on 2020-01-01: a\.png"):
        promote(versions, "zorb", 1, "production", reason="r")
