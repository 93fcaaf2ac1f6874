import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.documents.gather import gather_facts
from registry.documents.spdx import hub_license, is_spdx
from registry.entities import Execution, now
from registry.errors import PolicyError
from registry.policy.license_terms import (
    PERMISSIONS,
    TAINTS,
    UNRESTRICTED,
    LicenseTerms,
    allows_commercial,
    combine,
    conflicts,
    inherit,
    is_at_least_as_strict,
    unknown,
)
from registry.policy.licenses import CONSENT_TO_TRAIN, read_licenses
from registry.policy.rights import resolve_rights

TABLE = read_licenses()
LABELS = st.frozensets(st.sampled_from(["notice", "attribution", "uses:a", "uses:b", *TAINTS]), max_size=3)
TERMS = st.builds(
    LicenseTerms,
    permissions=st.frozensets(st.sampled_from(sorted(PERMISSIONS))),
    obligations=LABELS,
    restrictions=LABELS,
    licenses=LABELS,
    share_alike=st.frozensets(st.sampled_from(["CC-BY-SA-4.0", "CC-BY-NC-SA-4.0"])),
    unknown=st.frozensets(st.sampled_from(["a base", "an image"])),
)
ANY_TERMS = st.one_of(TERMS, st.sampled_from([entry.terms for entry in TABLE.licenses]))


@st.composite
def graphs(draw, most=1000):
    """Draws the own terms of each node, and its parents, which have smaller numbers."""
    size = draw(st.integers(1, most))
    pool = draw(st.lists(ANY_TERMS, min_size=1, max_size=6))
    random = draw(st.randoms(use_true_random=False))
    own = {node: random.choice([UNRESTRICTED, UNRESTRICTED, *pool]) for node in range(size)}
    parents = {
        node: random.sample(range(node), random.randint(0, min(node, 3)))
        for node in range(size)
        if random.random() < 0.9
    }
    return own, parents


@given(ANY_TERMS)
def test_combine_is_idempotent_and_unrestricted_is_neutral(terms):
    assert combine(terms, terms) == terms == combine(terms)
    assert combine(terms, UNRESTRICTED) == combine(UNRESTRICTED, terms) == terms
    assert combine() == UNRESTRICTED


@given(ANY_TERMS, ANY_TERMS)
def test_combine_is_commutative_and_never_looser_than_either(left, right):
    both = combine(left, right)
    assert both == combine(right, left)
    assert is_at_least_as_strict(both, left)
    assert is_at_least_as_strict(both, right)
    assert both.permissions <= left.permissions & right.permissions
    assert bool(conflicts(both)) >= bool(conflicts(left))


@given(ANY_TERMS, ANY_TERMS, ANY_TERMS)
def test_combine_is_associative(a, b, c):
    assert combine(combine(a, b), c) == combine(a, combine(b, c)) == combine(a, b, c)


@given(ANY_TERMS)
def test_a_taint_removes_its_permission_from_any_source(terms):
    tainted = combine(terms, LicenseTerms(restrictions=frozenset({"non-commercial"})))
    assert not allows_commercial(tainted)
    assert not combine(terms, unknown("a base")).permissions
    assert allows_commercial(UNRESTRICTED)


@settings(max_examples=15)
@given(graphs())
def test_terms_only_tighten_along_every_edge_of_any_graph(graph):
    own, parents = graph
    resolved = inherit(own, parents)
    assert resolved.keys() == own.keys()
    for node, sources in parents.items():
        assert is_at_least_as_strict(resolved[node], own[node])
        assert all(is_at_least_as_strict(resolved[node], resolved[source]) for source in sources)


@settings(max_examples=15)
@given(graphs(), st.data())
def test_removing_a_parent_never_tightens_and_adding_one_never_loosens(graph, data):
    own, parents = graph
    edges = [(node, source) for node, sources in parents.items() for source in sources]
    if not edges:
        return
    node, source = data.draw(st.sampled_from(edges))
    fewer = {**parents, node: [parent for parent in parents[node] if parent != source]}
    before, after = inherit(own, fewer), inherit(own, parents)
    assert all(is_at_least_as_strict(after[key], before[key]) for key in own)


@settings(max_examples=30)
@given(graphs(60))
def test_terms_combine_those_of_all_upstream_nodes_in_any_order(graph):
    own, parents = graph
    resolved = inherit(own, parents)

    def upstream(node):
        return {node}.union(*(upstream(source) for source in parents.get(node, ())))

    for node in own:
        assert resolved[node] == combine(*(own[key] for key in sorted(upstream(node), reverse=True)))


def test_versions_that_declare_each_other_as_parents_have_the_terms_of_both():
    own = {"a": TABLE.find("MIT").terms, "b": TABLE.find("cc-by-nc-4.0").terms, "c": unknown("c")}
    resolved = inherit(own, {"a": ["b"], "b": ["a"]})
    assert resolved["a"] == resolved["b"] == combine(own["a"], own["b"])
    assert resolved["c"] == own["c"]


def test_differing_share_alike_and_no_derivatives_are_conflicts():
    same, other = TABLE.find("cc-by-sa-4.0").terms, TABLE.find("cc-by-nc-sa-4.0").terms
    assert conflicts(same) == conflicts(combine(same, same, TABLE.find("mit").terms)) == ()
    assert "which cannot be met together" in conflicts(combine(same, other))[0]
    assert "no-derivatives" in conflicts(TABLE.find("cc-by-nd-4.0").terms)[0]
    assert conflicts(unknown("base 'x'")) == ("no license is known for base 'x'",)


@pytest.mark.parametrize("suffix", ["", "-SDXL"])
def test_ids_are_valid_in_spdx_and_ids_of_earlier_releases_mean_the_same(tmp_path, suffix):
    old, new = (f"LicenseRef-CreativeML-OpenRAIL{plus}-M{suffix}" for plus in ("++", "pp"))
    assert TABLE.find(old) is TABLE.find(new)
    assert TABLE.normalize(old) == new
    assert hub_license(old) == hub_license(new) == {"license": "openrail++"}
    own = {"date": "2026-01-01", "licenses": [{"id": old, "name": "ours", "permissions": ["derivatives"]}]}
    (tmp_path / "licenses.yaml").write_text(yaml.safe_dump(own))
    table = read_licenses(tmp_path)
    assert table.find(old).name == table.find(new).name == "ours"
    assert len(table.licenses) == len(TABLE.licenses)
    assert "commercial" not in table.terms_of_base({"": "sd2", "-SDXL": "sdxl"}[suffix]).permissions


def test_every_license_id_is_valid_in_spdx():
    for entry in TABLE.licenses:
        name = entry.id.removeprefix("LicenseRef-")
        assert is_spdx(entry.id) if name == entry.id else re.fullmatch("[A-Za-z0-9.-]+", name), entry.id


def test_the_shipped_table_has_a_date_a_disclaimer_and_the_names_of_hugging_face():
    assert TABLE.note == "not legal advice"
    assert TABLE.date.year >= 2026
    for name in ("creativeml-openrail-m", "openrail++", "apache-2.0", "cc-by-nc-4.0", "CC-BY-NC-4.0", "mit"):
        assert TABLE.find(name) is not None, name
    assert TABLE.find("openrail++").id == "LicenseRef-CreativeML-OpenRAILpp-M"
    for entry in TABLE.licenses:
        assert entry.url.startswith("https://") or entry.id == CONSENT_TO_TRAIN
        # A digest requires an immutable URL.
        assert entry.sha256 is None or re.search("/[0-9a-f]{40}/", entry.url)
    assert any(entry.sha256 for entry in TABLE.licenses)


def test_the_digest_of_apache_matches_our_copy():
    from lora_engine.files import sha256_file

    assert TABLE.find("Apache-2.0").sha256 == sha256_file(Path(__file__).parents[2] / "LICENSE")


@pytest.mark.parametrize(
    ("base", "license_id", "commercial"),
    [
        ("tiny", "Apache-2.0", True),
        ("sd15", "LicenseRef-CreativeML-OpenRAIL-M", True),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5@abc123", "LicenseRef-CreativeML-OpenRAIL-M", True),
        ("stabilityai/stable-diffusion-xl-base-1.0", "LicenseRef-CreativeML-OpenRAILpp-M-SDXL", True),
        ("sd3", "LicenseRef-Stability-Community", True),
        ("flux", "LicenseRef-FLUX-1-dev-NC", False),
        ("black-forest-labs/FLUX.1-schnell", "Apache-2.0", True),
    ],
)
def test_every_published_base_has_its_license(base, license_id, commercial):
    terms = TABLE.terms_of_base(base)
    assert terms.licenses == {license_id}
    assert allows_commercial(terms) is commercial
    assert conflicts(terms) == ()


@pytest.mark.parametrize(
    "name",
    [
        *("cc-by-2.0", "CC-BY-SA-2.0", "cc-by-sa-3.0", "Cc-By-Nc-2.0", "CC-BY-NC-SA-3.0", "CC-BY-NC-ND-2.5"),
        *("CC-BY-ND-3.0", "GPL-3.0-only", "gpl-3.0", "GPL-2.0+", "lgpl-2.1", "AGPL-3.0-or-later"),
        *("isc", "0bsd", "BSD-2-Clause", "mpl-2.0"),
    ],
)
def test_the_table_has_common_licenses_in_any_case(name):
    terms = TABLE.terms_of_license(name, "it")
    assert not terms.unknown
    assert allows_commercial(terms) is ("nc" not in name.lower())
    assert ("no-derivatives" in terms.restrictions) is ("-nd" in name.lower())
    assert bool(terms.share_alike) is ("-sa" in name.lower() or "gpl" in name.lower())


@pytest.mark.parametrize(
    ("text", "expression", "normal"),
    [
        ("mit AND cc-by-nc-4.0", "CC-BY-NC-4.0 AND MIT", "MIT AND CC-BY-NC-4.0"),
        ("CC-BY-NC-4.0 or mit", "MIT", "CC-BY-NC-4.0 OR MIT"),
        ("cc-by-4.0 or isc and cc-by-nc-4.0", "CC-BY-4.0", "CC-BY-4.0 OR ISC AND CC-BY-NC-4.0"),
        ("(cc-by-4.0 OR isc) AND cc-by-nc-4.0", "CC-BY-NC-4.0 AND ISC", "(CC-BY-4.0 OR ISC) AND CC-BY-NC-4.0"),
        ("((MIT))", "MIT", "MIT"),
        ("apache-2.0+", "Apache-2.0", "Apache-2.0"),
        ("GPL-2.0-only with Classpath-exception-2.0", *["GPL-2.0-only WITH Classpath-exception-2.0"] * 2),
        ("isc OR my-own", "ISC", "ISC OR my-own"),
        ("GPL-2.0-only WITH commons-clause", "GPL-2.0-only AND NOASSERTION", None),
        ("Apache-2.0 AND NOASSERTION", "Apache-2.0 AND NOASSERTION", None),
        *((text, "NOASSERTION", None) for text in ("MIT AND", "OR MIT", "(MIT", "MIT)", "()", "MIT ISC", "MIT WITH")),
        ("(" * 5000 + "MIT" + ")" * 5000, "NOASSERTION", None),
        ("MIT WITH (ISC OR MIT)", "NOASSERTION", None),
    ],
)
def test_spdx_expressions_have_the_terms_of_their_licenses(text, expression, normal):
    assert TABLE.terms_of_license(text, "it").expression == expression
    assert TABLE.normalize(text) == normal


@given(
    st.recursive(
        st.sampled_from(["mit", "cc-by-nc-4.0", "GPL-3.0-only", "unheard-of"]),
        lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["AND", "or"]), inner),
        max_leaves=6,
    )
)
def test_and_combines_its_sides_and_or_is_the_one_that_allows_the_most(text):
    terms, other = TABLE.terms_of_license(text, "it"), TABLE.find("cc-by-4.0").terms
    assert TABLE.terms_of_license(f"{text} AND CC-BY-4.0", "it") == combine(terms, other)
    assert TABLE.terms_of_license(f"{text} OR CC-BY-4.0", "it") in (terms, other)
    assert allows_commercial(TABLE.terms_of_license(f"{text} OR CC-BY-4.0", "it"))
    if (normal := TABLE.normalize(text)) is not None:
        assert TABLE.terms_of_license(normal, "it") == terms


def test_an_unknown_base_and_an_unstated_license_allow_nothing():
    for terms in (TABLE.terms_of_base("/models/mine", "a" * 64), TABLE.terms_of_license("NOASSERTION", "it")):
        assert not terms.permissions
        assert conflicts(terms)
    assert "'my own words' is not in the table" in conflicts(TABLE.terms_of_license("my own words", "it"))[0]


def test_the_embedded_base_is_known_by_its_fingerprint_too():
    from lora_engine.bases.source import resolve_base

    assert TABLE.terms_of_base("/anywhere", resolve_base("tiny").fingerprint()).licenses == {"Apache-2.0"}


@pytest.mark.parametrize("name", ["tiny", "sdxl", "flux-schnell"])
def test_the_name_of_a_local_folder_gives_no_license(name):
    terms = TABLE.terms_of_base(name, "a" * 64)
    assert terms.unknown == {f"base {name!r} with fingerprint {'a' * 64}"}
    assert TABLE.terms_of_base(name).licenses
    assert TABLE.terms_of_base("stable-diffusion-v1-5/stable-diffusion-v1-5@abc", "a" * 64).licenses


def test_a_home_adds_licenses_and_assigns_them_to_its_bases(tmp_path):
    own = {
        "date": "2026-11-01",
        "licenses": [{"id": "LicenseRef-House", "permissions": ["commercial", "derivatives"], "aliases": ["house"]}],
        "bases": [{"license": "house", "fingerprints": ["a" * 64], "hub": ["our/base"]}],
    }
    (tmp_path / "licenses.yaml").write_text(yaml.safe_dump(own))
    table = read_licenses(tmp_path)
    assert table.terms_of_base("anything", "a" * 64).licenses == {"LicenseRef-House"}
    assert table.terms_of_base("our/base@1").permissions == {"commercial", "derivatives"}
    assert table.find("mit") is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("licenses: [", "yaml:1:12: expected"),
        ("date: 2026-01-01\nlicences: []", "licences"),
        ("date: 2026-01-01\nbases: [{license: gone}]", "no license has that id"),
        (
            "date: 2026-01-01\nlicenses: [{id: X, permissions: [commercial], restrictions: [non-commercial]}]",
            "leave one out",
        ),
        ("date: 2026-01-01\nlicenses: [{id: X, permissions: [], aliases: [mit]}]", "two licenses have the name 'mit'"),
    ],
)
def test_an_invalid_table_is_refused_with_its_path(tmp_path, text, message):
    (tmp_path / "licenses.yaml").write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        read_licenses(tmp_path)
    assert str(tmp_path) in str(caught.value)


IMAGE = {"source": "a.png", "width": 4, "height": 4, "caption": "", "file": "pictures/0000000000000000.png"}


def rights_of(versions, version):
    with versions.lineage.database.read() as session:
        return resolve_rights(session, versions, version)


@pytest.fixture
def line(versions):
    """Returns a function that records a step on a base, images and adapters, and registers its output."""

    def make(name, content, base="tiny", images=(), adapters=(), uses="train", **values):
        store, lineage = versions.store, versions.lineage
        run = lineage.start_run(name, {})
        inputs = {f"adapters.{number}": version.artifact for number, version in enumerate(adapters)}
        if images:
            entries = [IMAGE | {"sha256": f"{number:064x}", **entry} for number, entry in enumerate(images)]
            inputs["dataset"] = store.put_files(
                "manifest", {"manifest.json": json.dumps({"pictures": entries}).encode()}
            )
        adapter = store.put_files("adapter", {"adapter.safetensors": content})
        values_of_step = base if isinstance(base, dict) else {"settings": {"base": base}} if base else {}
        done = Execution(run.id, run.id, name, uses, "1", run.id, values_of_step, inputs, adapter, started_at=now())
        lineage.log_execution(done, contents=store.files(adapter))
        lineage.finish_run(run.id, "COMPLETED")
        return versions.register(name, adapter, run_id=run.id, **values)

    return make


def test_an_adapter_has_the_terms_of_its_base_and_of_every_image(versions, line):
    nc = {"rights": {"license": "cc-by-nc-4.0", "rights": "licence"}}
    plain, tainted = line("a", b"a", images=[{}]), line("b", b"b", images=[{}, nc, nc])
    assert allows_commercial(rights_of(versions, plain).terms)
    resolved = rights_of(versions, tainted)
    assert not allows_commercial(resolved.terms)
    assert resolved.terms.licenses == {"Apache-2.0", "CC-BY-NC-4.0"}
    assert {source.what for source in resolved.sources} == {"base tiny", "2 images under cc-by-nc-4.0"}


@pytest.mark.parametrize("uses", ["merge", "extract", "distil", "convert"])
def test_terms_are_inherited_through_every_step_that_makes_adapters_from_adapters(versions, line, uses):
    free = line("free", b"1")
    bound = line("bound", b"2", declared="cc-by-nc-4.0")
    child = line("child", b"3", adapters=[free, bound], uses=uses)
    grandchild = line("grandchild", b"4", base=None, adapters=[child], uses=uses)
    unbound = line("unbound", b"5", adapters=[free], uses=uses)
    for version in (child, grandchild):
        assert "CC-BY-NC-4.0" in rights_of(versions, version).terms.licenses
        assert not allows_commercial(rights_of(versions, version).terms)
    assert allows_commercial(rights_of(versions, unbound).terms)


def test_terms_are_inherited_from_parents_by_name_and_by_file_digest(versions, line):
    bound = line("bound", b"2", declared="cc-by-nc-4.0")
    by_name = line("by-name", b"3", parents=["bound@1", "base:tiny"])
    by_file = line("by-file", b"4", parents=[f"0.5 bound sha256:{bound.sha256}"])
    neither = line("neither", b"5", parents=["0.5 bound sha256:" + "0" * 64])
    assert not allows_commercial(rights_of(versions, by_name).terms)
    assert not allows_commercial(rights_of(versions, by_file).terms)
    assert allows_commercial(rights_of(versions, neither).terms)


def test_a_local_base_has_the_license_of_its_fingerprint_wherever_it_is_named(versions, line):
    own = {"date": "2026-11-01", "bases": [{"license": "cc-by-nc-4.0", "fingerprints": ["a" * 64]}]}
    card = {"base": "mine", "base_fingerprint": "a" * 64}
    described = {"settings": {"base": "models/mine"}, "base": {"label": "mine", "fingerprint": "a" * 64}}
    version = line("mine", b"1", base=described, card=card, parents=["base:mine"])
    assert "base 'mine' with fingerprint" in conflicts(rights_of(versions, version).terms)[0]
    (versions.home.path / "licenses.yaml").write_text(yaml.safe_dump(own))
    rights = rights_of(versions, version)
    assert (rights.terms.licenses, rights.terms.unknown) == ({"CC-BY-NC-4.0"}, frozenset())
    assert [source.what for source in rights.sources] == ["base mine"]


@pytest.mark.parametrize("uses", ["merge", "convert"])
def test_a_step_that_only_rewrites_adapters_adds_no_base(versions, line, uses):
    parent = line("parent", b"1", base="sdxl")
    child = line("child", b"2", base="tiny", adapters=[parent], uses=uses)
    learned = line("learned", b"3", base="tiny", adapters=[parent], uses=uses, images=[{}])
    assert rights_of(versions, child).terms.licenses == {"LicenseRef-CreativeML-OpenRAILpp-M-SDXL"}
    assert "Apache-2.0" in rights_of(versions, learned).terms.licenses


def test_the_same_bytes_under_another_name_keep_their_declared_license(versions, line):
    first = line("first", b"same", declared="cc-by-nc-4.0")
    second = versions.register("second", first.artifact)
    assert not allows_commercial(rights_of(versions, second).terms)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": "/models/mine"}, "base '/models/mine'"),
        ({"base": None}, "neither base nor license"),
        ({"declared": "so to speak"}, "is not in the table"),
        ({"images": [{"rights": {"rights": "licence"}}]}, "1 image used under an unnamed license"),
        ({"images": [{"rights": {"license": "mine"}}]}, "'mine' is not in the table"),
    ],
)
def test_anything_unknown_upstream_is_a_conflict(versions, line, values, message):
    reasons = conflicts(rights_of(versions, line("a", b"a", **values)).terms)
    assert any(message in reason for reason in reasons), reasons


def test_a_consent_for_training_only_taints(versions, line):
    scoped = [{"rights": {"rights": "consent", "scope": scope}} for scope in ("train", "commercial")]
    trained = rights_of(versions, line("a", b"a", images=scoped)).terms
    assert not allows_commercial(trained)
    assert trained.expression == f"Apache-2.0 AND {CONSENT_TO_TRAIN}"
    assert allows_commercial(rights_of(versions, line("b", b"b", images=scoped[1:])).terms)


STATED = {"rights": "own", "person": False}


def test_statements_of_every_dataset_that_gave_the_same_adapter_count(versions, line):
    expired = [{"rights": STATED | {"expires": "2020-01-01", "license": "cc-by-nc-4.0"}}]
    for images in (expired, [{"rights": STATED}]):
        version = line("a", b"the same bytes", images=images)
        child = line("child", b"merged", adapters=[version], uses="merge")
    for made in (version, child):
        rights = rights_of(versions, made)
        assert "expired on 2020-01-01" in rights.consent.broken[0]
        assert not allows_commercial(rights.terms)
        assert len(gather_facts(versions, made).datasets) == 2


def test_an_upstream_adapter_without_a_dataset_is_missing_its_consent(versions, line):
    stated, bare = line("stated", b"1", images=[{"rights": STATED}]), line("bare", b"2", uses="import")
    complete = line("complete", b"3", adapters=[stated], uses="merge", parents=["1 stated sha256:" + "0" * 64])
    mixed = line("mixed", b"4", adapters=[complete, bare], uses="merge")
    for version in (stated, complete):
        assert rights_of(versions, version).consent.missing == ()
    assert rights_of(versions, mixed).consent.missing == ("no dataset is recorded for bare@1, so consent is unknown",)
    assert rights_of(versions, bare).consent.missing == ("no dataset is recorded, so consent is unknown",)


def test_a_dataset_that_cannot_be_read_is_unknown(versions, line):
    version = line("a", b"a", images=[{}])
    (entry,) = [
        entry
        for node in versions.lineage.walk(version.ref).nodes
        if node.label == "manifest"
        for entry in [versions.store.files(_ref(node))["manifest.json"]]
    ]
    versions.store.blobs.path(entry.sha256).unlink()
    assert "cannot be read" in conflicts(rights_of(versions, version).terms)[0]


def _ref(node):
    from registry.entities import ArtifactRef

    return ArtifactRef("manifest", node.id, node.detail["size"])
