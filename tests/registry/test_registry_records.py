"""Documents of a version conform to the official schemas, and escape markup in names and captions."""

import base64
import io
import json
import re
import shlex
from html.parser import HTMLParser
from typing import get_args, get_type_hints

import pytest
import yaml
from PIL import Image

from lora_engine.evaluation.plan import EvaluationPlan
from registry.documents.gather import gather_facts
from registry.documents.mlbom import mlbom
from registry.documents.provenance import provenance
from registry.documents.spdx import HUB, hub_license, is_spdx
from registry.documents.storage import (
    BOM,
    CARD,
    DOCUMENT_FILES,
    PROVENANCE,
    find_records,
    read_version_document,
    write_missing,
)
from registry.entities import Execution, now
from registry.policy.license_terms import LicenseTerms, forbidden_uses
from registry.policy.licenses import CONSENT_TO_TRAIN, read_licenses

EVIL = "<script>alert(1)</script> | `x` [a](javascript:b)\n# not a heading"
TINY_FINGERPRINT = read_licenses().bases[-1].fingerprints[0]
METRICS = {
    "clip_t": {"base": 0.2, "adapter": 0.25, "difference": 0.05, "interval": [0.01, 0.09], "n": 6, "verdict": "better"}
}


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make(versions):
    """Registers an adapter like a pipeline: a manifest with consents, a training, a report with images."""

    def registered(name="zorb", content=b"weights", scope=None, **changes):
        store, lineage = versions.store, versions.lineage
        spec = {"name": "try", "steps": {"photos": {"uses": "ingest", "images": "/home/anna/secret/pictures"}}}
        run = lineage.start_run("try", spec)
        images = [
            {"sha256": digit * 64, "width": 32, "height": 32, "caption": "a zorb", "split": split, "consent": consent}
            for digit, split, consent in (("1", "train", "C1"), ("2", "train", "C1"), ("3", "heldout", None))
        ]
        images[0]["rights"] = {"scope": scope}
        manifest = {"pictures": images, "quarantined": [{"source": "anna.jpg", "reason": "broken"}]}
        dataset = store.put_files("manifest", {"manifest.json": json.dumps(manifest).encode()})
        adapter = store.put_files("adapter", {"adapter.safetensors": content})
        samples = [
            {"prompt": "a red zorb", "kind": "paired", "seed": 3, "base": "pictures/b.png", "adapter": "pictures/a.png"}
            | {"reference": "pictures/r.png"}
        ]
        report = {"samples": samples, "base": {"family": "sd"}, "measured_on": "heldout"}
        shown = {"pictures/b.png": png("red"), "pictures/a.png": png("blue")}
        shown["pictures/r.png"] = png("green")
        report_ref = store.put_files("report", {"report.json": json.dumps(report).encode(), **shown})
        environment = {"packages": {"torch": "2.13.0"}, "distributions": ["numpy==2.4.6", "torch==2.13.0"]}
        steps = {
            "photos": {"output": dataset, "settings": {"files": {"images": "9" * 64}, "settings": {"heldout": 0.5}}},
            "adapter": {"inputs": {"dataset": dataset}, "output": adapter, "seed": 7, "environment": environment},
        }
        for step, values in steps.items():
            uses = {"photos": "ingest", "adapter": "train"}[step]
            lineage.log_execution(
                Execution(f"{run.id}-{step}", run.id, step, uses, "1", f"key of {step}", ended_at=now(), **values)
            )
        card = {
            "title": "Zorb ring",
            "base": "tiny",
            "base_fingerprint": TINY_FINGERPRINT,
            "trigger": "zorb",
            "class_word": "ring",
            "seed": 7,
            "recipe": {"kind": {"name": "lora"}, "rank": 8, "cache": "/home/anna/cache"},
        }
        values = {
            "report": report_ref,
            "run_id": run.id,
            "card": card | changes.pop("card", {}),
            "metrics": METRICS,
            "gates": [{"metric": "clip_t", "of": "difference", "min": 0.0, "max": None, "value": 0.05, "passed": True}],
            "passed": True,
        }
        return versions.register(name, adapter, **(values | changes))

    return registered


@pytest.fixture
def documents(versions, make):
    """Returns a function that registers a version, and returns file name -> content of its documents."""

    def written(**changes):
        version = make(**changes)
        records = find_records(versions.lineage, version)
        return {
            file: read_version_document(versions.store, records, version, file)
            for kind in records
            for file in DOCUMENT_FILES[kind]
        }

    return written


def test_registering_writes_the_documents_and_registering_again_keeps_them(versions, make):
    version = make()
    records = find_records(versions.lineage, version)
    assert set(records) == {CARD, PROVENANCE, BOM}
    assert make() == version
    assert find_records(versions.lineage, version) == records
    assert {path for ref in records.values() for path in versions.store.files(ref)} == {
        file for kind in (CARD, PROVENANCE, BOM) for file in DOCUMENT_FILES[kind]
    }


def test_documents_that_a_killed_process_did_not_write_are_written_by_the_next_call(versions, make, monkeypatch):
    monkeypatch.setattr("registry.versions.versions.write_missing", lambda *_arguments: None)
    version = make()
    assert find_records(versions.lineage, version) == {}
    assert set(write_missing(versions, version)) == {CARD, PROVENANCE, BOM}


def test_provenance_is_an_in_toto_statement_of_slsa(documents):
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    content = documents()["provenance.json"]
    statement = Statement.copy_from_pb(json_format.Parse(content, statement_pb2.Statement()))
    statement.validate()
    document = json.loads(content)
    # Unknown fields are an error here: the protobuf definition is the specification.
    json_format.ParseDict(document["predicate"], provenance_pb2.Provenance())
    assert document["predicateType"] == "https://slsa.dev/provenance/v1"


def test_provenance_names_inputs_and_output(versions, make):
    version = make()
    document = provenance(gather_facts(versions, version))
    assert document["subject"] == [{"name": "adapter.safetensors", "digest": {"sha256": version.sha256}}]
    definition, details = document["predicate"]["buildDefinition"], document["predicate"]["runDetails"]
    assert definition["externalParameters"]["spec"]["name"] == "try"
    assert definition["internalParameters"]["seed"] == 7
    assert definition["internalParameters"]["packages"] == ["numpy==2.4.6", "torch==2.13.0"]
    dependencies = {entry["name"]: entry["digest"]["sha256"] for entry in definition["resolvedDependencies"]}
    (dataset,) = gather_facts(versions, version).datasets
    assert dependencies["base"] == TINY_FINGERPRINT
    assert dependencies["dataset"] == dataset.artifact.sha256
    assert len(dependencies["packages"]) == 64
    assert details["metadata"]["invocationId"] == version.run_id
    assert details["metadata"]["startedOn"] <= details["metadata"]["finishedOn"]


def test_bill_of_materials_conforms_to_the_official_schema(documents):
    assert schema_problem(documents()["ml-bom.json"]) is None


@pytest.mark.parametrize("license_id", [None, "CC-BY-NC-4.0", "my own license", "creativeml-openrail-m"])
@pytest.mark.parametrize("parents", [(), ("base:tiny", "red@1", "star sha256:" + "c" * 64, "free text")])
def test_bill_of_materials_conforms_to_the_schema_with_missing_facts(versions, make, license_id, parents):
    make(name="red", content=b"red")
    version = make(card={"license": license_id}, parents=parents, report=None, metrics={}, gates=(), passed=None)
    assert schema_problem(json.dumps(mlbom(gather_facts(versions, version))).encode()) is None


def test_the_schema_rejects_an_invalid_bill(documents):
    bill = json.loads(documents()["ml-bom.json"])
    bill["metadata"]["component"]["hashes"][0]["content"] = "no digest"
    assert schema_problem(json.dumps(bill).encode())


def schema_problem(content: bytes):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode())


def test_bill_of_materials_names_ancestors_and_metrics(versions, make):
    red = make(name="red", content=b"red")
    version = make(parents=[f"Red sha256:{red.sha256}", "base:tiny"])
    component = mlbom(gather_facts(versions, version))["metadata"]["component"]
    ancestors = {entry["name"]: entry["hashes"][0]["content"] for entry in component["pedigree"]["ancestors"]}
    assert ancestors == {"tiny": TINY_FINGERPRINT, "red": red.sha256}
    (metric,) = [
        entry
        for entry in component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
        if entry["slice"] == "difference"
    ]
    assert metric["confidenceInterval"] == {"lowerBound": "0.01", "upperBound": "0.09"}
    assert component["hashes"] == [{"alg": "SHA-256", "content": version.sha256}]


def test_same_facts_give_the_same_bill(versions, make):
    version = make()
    assert mlbom(gather_facts(versions, version)) == mlbom(gather_facts(versions, version))


def test_card_has_the_front_matter_that_the_hub_reads(documents):
    matter, text = split_card(documents()["model-card.md"])
    assert matter["base_model"] == "tiny"
    assert matter["instance_prompt"] == "zorb ring"
    assert (matter["library_name"], matter["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"lora", "text-to-image"} <= set(matter["tags"])
    for part in ("Trigger words", "How to use it", "Figures", "Limits", "License", "Data", "Recipe", "Digests"):
        assert f"\n## {part}" in text
    assert "+0.0100 to +0.0900" in text
    assert "2 trained on, 1 held out" in text
    assert "| C1 | 2 |" in text


def test_a_card_says_which_images_the_metrics_are_of(versions, documents):
    expected = {
        "heldout": ("kept from training", "that were held out"),
        "training": ("trained on", "that it was trained on"),
    }
    assert expected.keys() == set(get_args(get_type_hints(EvaluationPlan)["measured_on"]))
    for measured_on, (figures, limit) in expected.items():
        content = json.dumps({"measured_on": measured_on}).encode()
        report = versions.store.put_files("report", {"report.json": content})
        text = documents(content=content, report=report)["model-card.md"].decode()
        assert f"on images that were {figures};" in text
        assert f"with images {limit}; see the intervals" in text


def test_the_hubs_own_library_reads_the_front_matter(documents):
    from huggingface_hub import ModelCard

    data = ModelCard(documents()["model-card.md"].decode()).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("tiny", "diffusers", "text-to-image")


@pytest.mark.parametrize(
    ("license_id", "matter"),
    [
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        (None, {"license": "unknown"}),
        ("creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        ("My own terms", {"license": "other", "license_name": "my-own-terms"}),
    ],
)
def test_a_license_has_its_name_of_the_hub(license_id, matter):
    assert hub_license(license_id) == matter


def test_every_license_of_the_table_has_an_spdx_id():
    from cyclonedx.schema import SchemaVersion  # noqa: F401  (the package carries the list)
    from cyclonedx.spdx import is_supported_id

    assert [name for name in HUB if not is_supported_id(name)] == []


def test_card_and_bill_state_what_the_scope_of_a_consent_forbids(documents):
    files = documents()
    assert "Not allowed" not in files["model-card.md"].decode()
    scoped = documents(name="scoped", content=b"scoped", scope="train")
    text, page = (scoped[name].decode() for name in ("model-card.md", "model-card.html"))
    assert "\n- Not allowed: commercial use\n" in text
    assert "<li>Not allowed: commercial use</li>" in page
    assert split_card(text.encode())[0]["license"] == "other"
    assert schema_problem(scoped["ml-bom.json"]) is None
    component = json.loads(scoped["ml-bom.json"])["metadata"]["component"]
    assert {"name": "loraline:license:not-allowed", "value": "commercial use"} in component["properties"]
    assert {"license": {"name": CONSENT_TO_TRAIN}} in component["licenses"]
    assert "Not allowed: commercial use." in component["modelCard"]["considerations"]["technicalLimitations"]


def test_every_restriction_of_the_table_has_a_phrase():
    table = read_licenses()
    stated = {restriction for entry in table.licenses for restriction in entry.restrictions}
    for restriction in stated:
        (phrase,) = forbidden_uses(LicenseTerms(restrictions=frozenset({restriction})))
        assert phrase != restriction
    assert "commercial use" in forbidden_uses(table.find("FLUX-dev").terms)
    assert forbidden_uses(table.find("mit").terms) == ()
    assert forbidden_uses(LicenseTerms(frozenset({"derivatives"}))) == ("commercial use", "redistribution")


def test_licenses_are_stated_as_spdx_ids_only_if_the_list_has_them():
    from cyclonedx.spdx import is_supported_id

    for entry in read_licenses().licenses:
        assert is_spdx(entry.id) is not entry.id.startswith("LicenseRef-")
        assert is_supported_id(entry.id) is is_spdx(entry.id)
    assert not any(map(is_spdx, ("MIT AND ISC", "mit", "my own")))


def test_documents_contain_no_path_of_the_machine(documents):
    for file, content in documents().items():
        assert b"anna" not in content, file
        assert b"/home" not in content, file
    assert b"pictures" in documents()["provenance.json"]


def test_user_text_is_escaped(documents):
    files = documents(card={"title": EVIL, "trigger": EVIL, "class_word": EVIL, "base": EVIL, "license": EVIL})
    page = files["model-card.html"].decode()
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    assert "<script" not in page
    matter, text = split_card(files["model-card.md"])
    assert matter["base_model"] == EVIL
    assert "\n# not a heading" not in text
    outside_of_code = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert "[a](javascript:b)" not in outside_of_code
    assert re.search(r"(?<!\\)<script", outside_of_code) is None


def test_a_command_of_the_card_runs_no_code_from_a_caption(documents):
    trigger = "$(touch evil) \"; touch evil; 'x"
    text = documents(card={"trigger": trigger, "base": "$(touch evil)"})["model-card.md"].decode()
    (line,) = [line for line in text.splitlines() if line.startswith("loraline generate")]
    _, verb, prompt, *rest = shlex.split(line)
    assert (verb, rest) == ("generate", ["--base", "$(touch evil)", "-o", "images"])
    assert "<lora:zorb@1:1>" in prompt


def test_a_card_uses_the_weight_that_the_adapter_recommends(documents):
    """Only a number is for all programs; a schedule is for Loraline's command alone, and is quoted."""
    for name, recommended, shown in (("a", "0.8", "0.8"), ("b", "0@0,1@1", "1"), ("c", "$(touch evil)", "1")):
        text = documents(name=name, card={"trigger": "zorb", "recommended": recommended})["model-card.md"].decode()
        assert f"zorb <lora:{name}-1:{shown}>" in text
        (line,) = [line for line in text.splitlines() if line.startswith("loraline generate")]
        assert shlex.split(line)[2].endswith(f"<lora:{name}@1:{recommended}>")


def test_page_embeds_its_images_and_loads_nothing(documents):
    page = documents()["model-card.html"].decode()
    tags = Tags()
    tags.feed(page)
    sources = [value for name, value in tags.attributes if name in {"src", "href", "srcset", "action"}]
    assert len(sources) == 2, "base and adapter only: the reference image may show people, and stays in the report"
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (4, 4)
    assert "url(" not in page


def test_images_are_embedded_up_to_a_limit(versions, make, monkeypatch):
    version = make()
    assert len(gather_facts(versions, version).samples) == 1
    monkeypatch.setattr("registry.documents.gather.MAX_IMAGE_BYTES", 10)
    assert gather_facts(versions, version).samples == []


def test_limits_follow_from_the_facts(documents):
    measured = documents()["model-card.md"].decode()
    assert "No consent is recorded for 1 of its images" in measured
    assert "never evaluated" not in measured
    bare = documents(
        content=b"bare", report=None, metrics={}, gates=(), passed=None, card={"license": None, "base": ""}
    )
    assert "never evaluated" in bare["model-card.md"].decode()
    assert "license is unknown" in bare["model-card.md"].decode()


def test_an_imported_adapter_has_documents(versions):
    artifact = versions.store.put_files("adapter", {"adapter.safetensors": b"imported"})
    version = versions.register("imported", artifact)
    records = find_records(versions.lineage, version)
    document = json.loads(read_version_document(versions.store, records, version, "provenance.json"))
    assert document["predicate"]["buildDefinition"]["buildType"] == "urn:loraline:import:1"
    assert schema_problem(read_version_document(versions.store, records, version, "ml-bom.json")) is None


def test_an_invalid_report_does_not_block_registration(versions, make):
    other = versions.store.put_files("report", {"report.json": b"\xff not JSON"})
    assert gather_facts(versions, make(report=other)).report == {}


def test_mlflow_shows_documents_description_and_datasets(synced, register, home):
    from mlflow import MlflowClient

    version = register(synced, b"weights", alias_request="candidate")
    client = MlflowClient(tracking_uri=home.mlflow_url, registry_uri=home.mlflow_url)
    documents = {entry.path for entry in client.list_artifacts(version.mlflow_run_id, "documents")}
    assert {f"documents/{file}" for kind in (CARD, PROVENANCE, BOM) for file in DOCUMENT_FILES[kind]} <= documents
    assert "documents/report.html" in documents, "uploaded documents are shown beside generated ones"
    shown = client.get_model_version("zorb", "1")
    assert shown.description.startswith("**Zorb**")
    assert "documents/model-card.html" in shown.description
    assert client.get_registered_model("zorb").description == shown.description
    run = client.get_run(version.mlflow_run_id)
    assert run.data.tags["mlflow.note.content"] == shown.description
    (dataset,) = [entry for entry in run.inputs.dataset_inputs if entry.dataset.name == "dataset"]
    tags = {tag.key: tag.value for tag in dataset.tags}
    (execution,) = [entry for entry in synced.lineage.executions(version.run_id) if entry.step == "adapter"]
    assert tags["loraline.sha256"] == execution.inputs["dataset"].sha256
    assert tags["loraline.sha256"].startswith(dataset.dataset.digest)


def test_a_version_with_a_missing_report_does_not_block_the_sync_of_others(synced, register, monkeypatch, caplog):
    monkeypatch.setattr("registry.versions.versions.write_missing", lambda *_arguments: None)
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    damaged, intact = register(synced, b"lost"), register(synced, b"kept", name="star")
    monkeypatch.undo()
    synced.store.blobs.path(damaged.report.sha256).unlink()
    synced.sync()
    assert synced.show("star").mlflow_run_id
    assert synced.show("zorb").mlflow_run_id
    assert "zorb@1" in caplog.text
    assert find_records(synced.lineage, intact)
    assert not find_records(synced.lineage, damaged)


def split_card(content: bytes):
    _, matter, text = content.decode().split("---\n", 2)
    return yaml.safe_load(matter), text


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes = set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
