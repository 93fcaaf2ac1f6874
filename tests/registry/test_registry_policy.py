import dataclasses
from datetime import UTC, date, datetime

import pytest

from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import PolicyError, PromotionError, Refused
from registry.policy.alias_policy import PRESETS, AliasPolicy, PolicyFacts, decide
from registry.policy.consent import ConsentFindings, find_consent
from registry.policy.license_terms import UNRESTRICTED, combine, unknown
from registry.policy.licenses import read_licenses
from registry.policy.policy_file import read_policies
from registry.versions.projections import replay
from registry.versions.promotion import history, promote, remove, rollback

GATE = {"metric": "clip_t", "of": "difference", "min": 0.0, "max": 1.0, "value": 0.5, "passed": True}
VERSION = AdapterVersion(
    name="zorb",
    version=1,
    sha256="a" * 64,
    size=1,
    artifact=ArtifactRef("adapter", "b" * 64, 1),
    adapter_path="adapter.safetensors",
    report=None,
    aliases=(),
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    run_id=None,
    mlflow_run_id=None,
    card={},
    metrics={},
    gates=(GATE,),
    passed=True,
    parents=(),
)
CLEAN = PolicyFacts(terms=UNRESTRICTED, consent=ConsentFindings(), signature=(), actor="ada@lab")
NC = read_licenses().find("cc-by-nc-4.0").terms
NOTHING = dataclasses.replace(NC, licenses=frozenset())
STRICT = AliasPolicy(needs_licence="commercial", needs_consent="complete", needs_signature=True, movers=("ada@*",))


@pytest.mark.parametrize(
    ("policy", "facts", "reason", "is_final"),
    [
        (AliasPolicy(), {"damage": ("gone",)}, "its bytes are damaged: gone", True),
        (AliasPolicy(), {"structure": ("NaN in x",)}, "it is not a valid adapter: NaN in x", True),
        (AliasPolicy(), {"revoked": ("consent 'C-1'",)}, "consent 'C-1' was revoked", True),
        (AliasPolicy(movers=("eve@*", "bob")), {}, "ada@lab may not move this alias; eve@*, bob may", True),
        (AliasPolicy(), {"denied": ("no role",)}, "no role", True),
        (AliasPolicy(), {"unapproved": ("1 of 2 approvals",)}, "1 of 2 approvals", True),
        (AliasPolicy(needs_licence="known"), {"terms": unknown("base 'x'")}, "no license is known for base 'x'", False),
        (AliasPolicy(needs_licence="known"), {"terms": None}, "its license was not checked", False),
        (AliasPolicy(needs_licence="commercial"), {"terms": NC}, "commercial use is not allowed (CC-BY-NC-4.0)", False),
        (
            AliasPolicy(needs_licence="commercial"),
            {"terms": NOTHING},
            "commercial use is not allowed (no license)",
            False,
        ),
        (AliasPolicy(needs_consent="known"), {"consent": ConsentFindings(1, ("expired",))}, "expired", False),
        (AliasPolicy(needs_consent="known"), {"consent": None}, "the consent for its images was not checked", False),
        (AliasPolicy(needs_consent="complete"), {"consent": ConsentFindings(1, (), ("no basis",))}, "no basis", False),
        (AliasPolicy(needs_signature=True), {"signature": ("unsigned",)}, "unsigned", False),
        (AliasPolicy(needs_signature=True), {"signature": None}, "its signature was not checked", False),
    ],
)
def test_every_unmet_requirement_is_a_reason(policy, facts, reason, is_final):
    decision = decide(VERSION, policy, dataclasses.replace(CLEAN, **facts))
    assert (decision.allowed, decision.reasons) == (False, (reason,))
    assert bool(decision.final) is is_final
    assert decide(VERSION, policy.model_copy(update={"movers": ("*",)}), CLEAN).allowed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "WITHDRAWN"}, "it was withdrawn"),
        ({"passed": False}, "its evaluation did not pass"),
        ({"gates": (GATE | {"value": -0.5},)}, "gate clip_t (difference) is -0.5, below its minimum 0"),
        ({"gates": (GATE | {"value": 2.0, "of": ""},)}, "gate clip_t is 2, above its maximum 1"),
        ({"gates": (GATE | {"passed": False},)}, "gate clip_t (difference) did not pass"),
        ({"gates": (GATE | {"value": 1.0},)}, None),
    ],
)
def test_a_state_an_evaluation_or_a_gate_is_a_reason(change, reason):
    policy = AliasPolicy(needs_evaluation=True, needs_gate=True)
    assert decide(dataclasses.replace(VERSION, **change), policy, CLEAN).reasons == ((reason,) if reason else ())


def test_facts_without_a_requirement_are_no_reason():
    facts = PolicyFacts(
        terms=unknown("it"), consent=ConsentFindings(1, ("expired",), ("no basis",)), signature=("unsigned",)
    )
    assert decide(VERSION, AliasPolicy(), facts).allowed


def test_all_reasons_are_listed_at_once():
    facts = PolicyFacts(
        damage=("gone",),
        structure=("NaN",),
        terms=combine(NC, unknown("a base")),
        consent=ConsentFindings(2, ("expired",), ("no basis",)),
        revoked=("image 5",),
        signature=("unsigned",),
        actor="eve@lab",
    )
    version = dataclasses.replace(VERSION, state="WITHDRAWN", passed=False, gates=())
    policy = STRICT.model_copy(update={"needs_evaluation": True, "needs_gate": True})
    decision = decide(version, policy, facts)
    assert len(decision.reasons) == 11
    assert len(decision.final) == 5


def test_default_policy_allows_images_without_statements_in_production():
    datasets = {ArtifactRef("manifest", "c" * 64, 1): ({"sha256": "1" * 64, "source": "own.png"},)}
    findings = find_consent(datasets, date(2026, 11, 1))
    assert findings.missing
    for alias in ("staging", "production"):
        assert decide(VERSION, PRESETS["default"][alias], dataclasses.replace(CLEAN, consent=findings)).allowed
    strict = decide(VERSION, PRESETS["strict"]["production"], dataclasses.replace(CLEAN, consent=findings))
    assert not strict.allowed


def test_expired_consent_is_found_on_the_day_after():
    datasets = {
        ArtifactRef("manifest", "c" * 64, 1): (
            {"sha256": "1" * 64, "source": "a.png", "rights": {"expires": "2026-06-30"}},
        )
    }
    assert find_consent(datasets, date(2026, 6, 30)).broken == ()
    assert find_consent(datasets, date(2026, 7, 1)).broken == (
        "1 image with consent that expired on 2026-06-30: a.png",
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "without a legal basis"),
        ({"rights": {"rights": "own"}}, "without a statement about depicted people"),
        ({"rights": {"rights": "own", "person": True}}, "without a consent id"),
        ({"rights": {"rights": "consent", "person": False}}, "without a consent id"),
        ({"rights": {"rights": "licence", "person": False}}, "under an unnamed license"),
        ({"rights": {"rights": "tdm", "person": False}}, "without a check for opt-outs"),
    ],
)
def test_a_complete_record_states_basis_people_consent_license_and_opt_out(entry, message):
    def find(image):
        return find_consent({ArtifactRef("manifest", "c" * 64, 1): ({"sha256": "1" * 64, **image},)}, date(2026, 1, 1))

    assert any(message in reason for reason in find(entry).missing)
    complete = {"consent": "C-1", "rights": {"rights": "consent", "person": True}}
    assert find(complete).missing == ()


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("bad", "field", "message"),
    [
        ({"expires": "2020-01-01"}, "broken", "expired"),
        ({"opt_out": {"result": "opted-out"}}, "broken", "opted out"),
        ({"rights": None}, "missing", "without a legal basis"),
        ({"person": True}, "missing", "without a consent id"),
    ],
)
def test_one_bad_statement_of_any_dataset_is_enough(position, bad, field, message):
    good = {"rights": "own", "person": False}
    images = [{"sha256": "1" * 64, "source": f"{index}.png", "rights": good} for index in range(3)]
    images[position] = images[position] | {"rights": good | bad}
    datasets = {ArtifactRef("manifest", f"{index}" * 64, 1): (image,) for index, image in enumerate(images)}
    findings = find_consent(datasets, date(2026, 1, 1))
    assert findings.pictures == 1
    (reason,) = findings.broken + findings.missing
    assert getattr(findings, field) == (reason,)
    assert reason.startswith("1 image ")
    assert message in reason


def test_an_opt_out_breaks_the_consent_of_mined_images():
    rights = {"rights": "tdm", "opt_out": {"tool": "ai.txt", "checked": "2026-01-01", "result": "opted-out"}}
    findings = find_consent({ArtifactRef("manifest", "c" * 64, 1): ({"sha256": "1" * 64, "rights": rights},)}, date.max)
    assert "opted out" in findings.broken[0]


def test_without_a_file_the_default_policy_applies(tmp_path):
    policies = read_policies(tmp_path)
    assert policies.of("production") == PRESETS["default"]["production"]
    assert policies.of("other") == AliasPolicy()
    assert policies.recall == "flag"


def test_a_file_chooses_a_preset_and_changes_single_aliases(tmp_path):
    (tmp_path / "policy.yaml").write_text(
        "policy: strict\nrecall: withdraw\naliases:\n"
        "  production: {needs_signature: false, movers: [ada@lab, '*@release']}\n  canary: {needs_evaluation: true}\n"
    )
    policies = read_policies(tmp_path)
    production = policies.of("production")
    assert (production.needs_consent, production.needs_signature) == ("complete", False)
    assert [production.may_move(actor) for actor in ("ada@lab", "bot@release", "eve@lab")] == [True, True, False]
    assert policies.of("canary").needs_evaluation
    assert policies.recall == "withdraw"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: lax", "policy: Input should be 'default' or 'strict'"),
        ("aliases: {production: {needs_gates: true}}", "aliases.production.needs_gates"),
        ("aliases: {production: {needs_gate: 'no'}}", "valid boolean"),
        ("aliases: {production: {needs_licence: some}}", "'none', 'known' or 'commercial'"),
        ("aliases: {Production: {}}", "invalid alias"),
        ("aliases: {production: {movers: []}}", "at least 1 item"),
        ("aliases: [", "yaml:1:11: expected"),
        ("polcy: strict", "polcy"),
    ],
)
def test_an_invalid_policy_is_refused_with_its_path(tmp_path, text, message):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        read_policies(tmp_path)
    assert str(tmp_path / "policy.yaml") in str(caught.value)


def test_every_mistake_of_a_policy_is_listed_at_once(tmp_path):
    (tmp_path / "policy.yaml").write_text("aliases: {a: {x: 1}, b: {y: 2}}")
    with pytest.raises(PolicyError, match=r"yaml:1:15: aliases\.a\.x.*aliases\.b\.y"):
        read_policies(tmp_path)


def write_policy(versions, text):
    (versions.home.path / "policy.yaml").write_text(text)


def test_an_override_event_stores_the_overridden_reasons(versions, register):
    register(versions, b"bad", passed=False, gates=[{**GATE, "value": -1}], parents=["base:gone/base"])
    with pytest.raises(Refused):
        promote(versions, "zorb", 1, "production", reason="please")
    event = promote(versions, "zorb", 1, "production", reason="I know better", actor="ada@lab", override=True)
    assert (event.action, event.after, event.actor) == ("override", 1, "ada@lab")
    assert len(event.details["overridden"]) == 2
    assert replay(history(versions, "zorb")) == {("zorb", "production"): 1}


def test_an_override_of_nothing_is_a_promotion(versions, register):
    register(versions, b"good")
    assert promote(versions, "zorb", 1, "production", reason="r", override=True).action == "promote"


def test_an_override_requires_an_overridable_policy_and_a_valid_adapter(versions, register):
    register(versions, b"bad", passed=False, gates=[{**GATE, "value": -1}])
    with pytest.raises(Refused, match="cannot be overridden: it is not a valid"):
        promote(versions, "zorb", 1, "production", reason="r", override=True, structure=("NaN",))
    write_policy(versions, "aliases: {production: {overridable: false}}")
    with pytest.raises(Refused, match="allows no override"):
        promote(versions, "zorb", 1, "production", reason="r", override=True)
    assert [event.action for event in history(versions, "zorb")] == ["refuse", "refuse"]


def test_only_movers_move_roll_back_and_remove_a_protected_alias(versions, register):
    for content in (b"1", b"2"):
        register(versions, content)
    write_policy(versions, "aliases: {production: {movers: [ada@lab]}}")
    for number in (1, 2):
        promote(versions, "zorb", number, "production", reason="r", actor="ada@lab")
    eve = {"reason": "r", "actor": "eve@lab"}
    for move in (
        lambda: promote(versions, "zorb", 1, "production", **eve),
        lambda: promote(versions, "zorb", 1, "production", override=True, **eve),
        lambda: rollback(versions, "zorb", **eve),
        lambda: remove(versions, "zorb", "production", **eve),
    ):
        with pytest.raises(Refused, match="eve@lab may not move this alias"):
            move()
    assert versions.show("zorb", "production").version == 2
    assert rollback(versions, "zorb", actor="ada@lab").after == 1
    assert remove(versions, "zorb", "production", reason="r", actor="ada@lab").before == 1


def test_rollback_restores_a_removed_alias_by_default_and_by_event_number(versions, register):
    for content in (b"1", b"2", b"3"):
        register(versions, content)
    events = [promote(versions, "zorb", number, "production", reason="next") for number in (1, 2, 3)]
    removed = remove(versions, "zorb", "production", reason="off")
    assert (removed.action, removed.before, removed.after) == ("remove", 3, None)
    assert rollback(versions, "zorb").after == 3
    assert rollback(versions, "zorb", to_event=events[0].seq).after == 1
    with pytest.raises(PromotionError, match="pointed at nothing after event"):
        rollback(versions, "zorb", to_event=removed.seq)
    with pytest.raises(PromotionError, match="no event 99 yet"):
        rollback(versions, "zorb", to_event=99)
    assert replay(history(versions, "zorb")) == {("zorb", "production"): 1}


def test_staging_at_registration_requires_a_known_license(versions, register):
    assert register(versions, b"known", alias_request="staging").aliases == ("staging",)
    refused = register(versions, b"unknown", alias_request="staging", parents=["base:gone/base"])
    assert refused.aliases == ()
    assert "base 'gone/base'" in history(versions, "zorb", "staging")[-1].reason


def test_a_strict_home_requires_more_for_production(versions, register):
    register(versions, b"good")
    write_policy(versions, "policy: strict")
    with pytest.raises(Refused) as caught:
        promote(versions, "zorb", 1, "production", reason="r", override=True)
    assert any("it is not signed" in reason for reason in caught.value.reasons)
    (versions.home.path / "policy.yaml").unlink()
    assert promote(versions, "zorb", 1, "production", reason="r").action == "promote"


def test_generated_images_count_only_if_the_policy_does_not_allow_them():
    def entry(**rights):
        return {"sha256": "1" * 64, "source": "a.png", "rights": rights}

    def findings(**rights):
        return find_consent({ArtifactRef("manifest", "c" * 64, 1): (entry(**rights),)}, date(2026, 1, 1))

    strict = AliasPolicy(allows_generated=False)
    for rights in ({"evidence": ["a1111-parameters"]}, {"ai_generated": True}):
        facts = dataclasses.replace(CLEAN, consent=findings(**rights))
        assert decide(VERSION, AliasPolicy(), facts).allowed
        assert decide(VERSION, strict, facts).reasons == ("1 images are generated, as their metadata or owners say",)
    assert decide(VERSION, strict, dataclasses.replace(CLEAN, consent=findings(evidence=["c2pa-manifest"]))).allowed
    assert not decide(VERSION, strict, dataclasses.replace(CLEAN, consent=None)).allowed


@pytest.mark.parametrize(("policy", "allowed", "warned"), [("off", True, 0), ("warn", True, 2), ("strict", False, 0)])
def test_the_consent_policy_holds_for_every_alias(policy, allowed, warned):
    facts = dataclasses.replace(CLEAN, consent=ConsentFindings(1, ("expired",), ("no basis",)), consent_policy=policy)
    decision = decide(VERSION, AliasPolicy(), facts)
    assert (decision.allowed, len(decision.warnings)) == (allowed, warned)
    silent = dataclasses.replace(facts, consent=ConsentFindings(1, (), ("no basis",), is_stated=False))
    assert len(decide(VERSION, AliasPolicy(), silent).warnings) == 0


@pytest.mark.parametrize(("length", "accepted"), [(1_000, True), (1_001, False)])
def test_a_pattern_of_movers_has_a_bounded_length(tmp_path, length, accepted):
    (tmp_path / "policy.yaml").write_text(
        f"aliases: {{production: {{movers: ['{'*a' * (length // 2)}{'b' * (length % 2)}']}}}}"
    )
    if accepted:
        assert len(read_policies(tmp_path).of("production").movers[0]) == length
    else:
        with pytest.raises(PolicyError, match="at most 1000 characters"):
            read_policies(tmp_path)
