"""The documents of a version, against the official schemas, and against what people write into names and captions."""

import base64
import io
import json
import re
import shlex
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from registry.documents.gather import gather_facts
from registry.documents.mlbom import mlbom
from registry.documents.provenance import provenance
from registry.documents.spdx import HUB, hub_license
from registry.documents.storage import BOM, CARD, FILES, PROVENANCE, find_records, read_document, write_missing
from registry.entities import Execution, now

EVIL = "<script>alert(1)</script> | `x` [a](javascript:b)\n# not a heading"
METRICS = {
    "clip_t": {"base": 0.2, "adapter": 0.25, "difference": 0.05, "interval": [0.01, 0.09], "n": 6, "verdict": "better"}
}


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make(versions):
    """Registers an adapter as a pipeline would: a manifest with consents, a training, a report with pictures."""

    def registered(name="zorb", content=b"weights", **changes):
        store, lineage = versions.store, versions.lineage
        spec = {"name": "try", "steps": {"photos": {"uses": "ingest", "images": "/home/anna/secret/pictures"}}}
        run = lineage.start_run("try", spec)
        pictures = [
            {"sha256": digit * 64, "width": 32, "height": 32, "caption": "a zorb", "split": split, "consent": consent}
            for digit, split, consent in (("1", "train", "C1"), ("2", "train", "C1"), ("3", "heldout", None))
        ]
        manifest = {"pictures": pictures, "quarantined": [{"source": "anna.jpg", "reason": "broken"}]}
        dataset = store.put_files("manifest", {"manifest.json": json.dumps(manifest).encode()})
        adapter = store.put_files("adapter", {"adapter.safetensors": content})
        samples = [
            {"prompt": "a red zorb", "kind": "paired", "seed": 3, "base": "pictures/b.png", "adapter": "pictures/a.png"}
            | {"reference": "pictures/r.png"}
        ]
        report = {"samples": samples, "base": {"family": "sd"}, "measured_on": "heldout"}
        shown = {"pictures/b.png": picture("red"), "pictures/a.png": picture("blue")}
        shown["pictures/r.png"] = picture("green")
        report_ref = store.put_files("report", {"report.json": json.dumps(report).encode(), **shown})
        environment = {"packages": {"torch": "2.13.0"}, "distributions": ["numpy==2.4.6", "torch==2.13.0"]}
        steps = {
            "photos": {"output": dataset, "settings": {"files": {"images": "9" * 64}, "settings": {"heldout": 0.5}}},
            "adapter": {"inputs": {"dataset": dataset}, "output": adapter, "seed": 7, "environment": environment},
        }
        for step, values in steps.items():
            uses = {"photos": "ingest", "adapter": "train"}[step]
            lineage.record(
                Execution(f"{run.id}-{step}", run.id, step, uses, "1", f"key of {step}", ended_at=now(), **values)
            )
        card = {
            "title": "Zorb ring",
            "base": "tiny",
            "base_fingerprint": "b" * 64,
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
    """Registers, and gives the content of each document by the name of its file."""

    def written(**changes):
        version = make(**changes)
        records = find_records(versions.lineage, version)
        return {file: read_document(versions.store, records, version, file) for kind in records for file in FILES[kind]}

    return written


def test_registering_writes_the_documents_and_registering_again_keeps_them(versions, make):
    version = make()
    records = find_records(versions.lineage, version)
    assert set(records) == {CARD, PROVENANCE, BOM}
    assert make() == version
    assert find_records(versions.lineage, version) == records
    assert {path for ref in records.values() for path in versions.store.files(ref)} == {
        file for kind in (CARD, PROVENANCE, BOM) for file in FILES[kind]
    }


def test_documents_that_a_killed_process_left_out_are_written_by_the_next_call(versions, make, monkeypatch):
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
    said = json.loads(content)
    # Unknown fields are an error here: the protobuf definition is the specification.
    json_format.ParseDict(said["predicate"], provenance_pb2.Provenance())
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"


def test_provenance_names_what_went_in_and_what_came_out(versions, make):
    version = make()
    said = provenance(gather_facts(versions, version))
    assert said["subject"] == [{"name": "adapter.safetensors", "digest": {"sha256": version.sha256}}]
    definition, details = said["predicate"]["buildDefinition"], said["predicate"]["runDetails"]
    assert definition["externalParameters"]["spec"]["name"] == "try"
    assert definition["internalParameters"]["seed"] == 7
    assert definition["internalParameters"]["packages"] == ["numpy==2.4.6", "torch==2.13.0"]
    found = {entry["name"]: entry["digest"]["sha256"] for entry in definition["resolvedDependencies"]}
    (dataset,) = gather_facts(versions, version).datasets
    assert found["base"] == "b" * 64
    assert found["dataset"] == dataset.artifact.sha256
    assert len(found["packages"]) == 64
    assert details["metadata"]["invocationId"] == version.run_id
    assert details["metadata"]["startedOn"] <= details["metadata"]["finishedOn"]


def test_bill_of_materials_fits_the_official_schema(documents):
    assert schema_problem(documents()["ml-bom.json"]) is None


@pytest.mark.parametrize("licence", [None, "CC-BY-NC-4.0", "my own licence", "creativeml-openrail-m"])
@pytest.mark.parametrize("parents", [(), ("base:tiny", "red@1", "star sha256:" + "c" * 64, "free text")])
def test_bill_of_materials_fits_the_schema_whatever_is_known(versions, make, licence, parents):
    make(name="red", content=b"red")
    version = make(card={"license": licence}, parents=parents, report=None, metrics={}, gates=(), passed=None)
    assert schema_problem(json.dumps(mlbom(gather_facts(versions, version))).encode()) is None


def test_a_bill_of_another_form_is_found_by_the_schema(documents):
    bill = json.loads(documents()["ml-bom.json"])
    bill["metadata"]["component"]["hashes"][0]["content"] = "no digest"
    assert schema_problem(json.dumps(bill).encode())


def schema_problem(content: bytes):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode())


def test_bill_of_materials_says_what_it_is_made_of(versions, make):
    red = make(name="red", content=b"red")
    version = make(parents=[f"Red sha256:{red.sha256}", "base:tiny"])
    component = mlbom(gather_facts(versions, version))["metadata"]["component"]
    ancestors = {entry["name"]: entry["hashes"][0]["content"] for entry in component["pedigree"]["ancestors"]}
    assert ancestors == {"tiny": "b" * 64, "red": red.sha256}
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
    for part in ("Trigger words", "How to use it", "Figures", "Limits", "Licence", "Data", "Recipe", "Digests"):
        assert f"\n## {part}" in text
    assert "+0.0100 to +0.0900" in text
    assert "2 trained on, 1 held out" in text
    assert "| C1 | 2 |" in text


def test_front_matter_is_what_the_hubs_own_library_reads(documents):
    from huggingface_hub import ModelCard

    data = ModelCard(documents()["model-card.md"].decode()).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("tiny", "diffusers", "text-to-image")


@pytest.mark.parametrize(
    ("licence", "matter"),
    [
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        (None, {"license": "unknown"}),
        ("creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        ("My own terms", {"license": "other", "license_name": "my-own-terms"}),
    ],
)
def test_a_licence_goes_by_the_hubs_name(licence, matter):
    assert hub_license(licence) == matter


def test_every_licence_of_the_table_is_one_of_spdx():
    from cyclonedx.schema import SchemaVersion  # noqa: F401  (the package carries the list)
    from cyclonedx.spdx import is_supported_id

    assert [name for name in HUB if not is_supported_id(name)] == []


def test_documents_name_no_path_of_the_machine(documents):
    for file, content in documents().items():
        assert b"anna" not in content, file
        assert b"/home" not in content, file
    assert b"pictures" in documents()["provenance.json"]


def test_what_people_write_is_text_and_never_markup(documents):
    found = documents(card={"title": EVIL, "trigger": EVIL, "class_word": EVIL, "base": EVIL, "license": EVIL})
    page = found["model-card.html"].decode()
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    assert "<script" not in page
    matter, text = split_card(found["model-card.md"])
    assert matter["base_model"] == EVIL
    assert "\n# not a heading" not in text
    outside_of_code = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert "[a](javascript:b)" not in outside_of_code
    assert re.search(r"(?<!\\)<script", outside_of_code) is None


def test_a_command_that_is_copied_from_a_card_runs_nothing_that_a_caption_says(documents):
    trigger = "$(touch evil) \"; touch evil; 'x"
    text = documents(card={"trigger": trigger, "base": "$(touch evil)"})["model-card.md"].decode()
    (line,) = [line for line in text.splitlines() if line.startswith("loraline generate")]
    _, verb, prompt, *rest = shlex.split(line)
    assert (verb, rest) == ("generate", ["--base", "$(touch evil)", "-o", "pictures"])
    assert "<lora:zorb@1:1>" in prompt


def test_page_holds_its_pictures_and_loads_nothing(documents):
    page = documents()["model-card.html"].decode()
    tags = Tags()
    tags.feed(page)
    sources = [value for name, value in tags.attributes if name in {"src", "href", "srcset", "action"}]
    assert len(sources) == 2, "before and after; the real one is of a person, and stays in the report"
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (4, 4)
    assert "url(" not in page


def test_pictures_are_embedded_up_to_a_limit(versions, make, monkeypatch):
    version = make()
    assert len(gather_facts(versions, version).samples) == 1
    monkeypatch.setattr("registry.documents.gather.MAX_PICTURE_BYTES", 10)
    assert gather_facts(versions, version).samples == []


def test_limits_follow_from_what_is_known(documents):
    measured = documents()["model-card.md"].decode()
    assert "No consent is recorded for 1 of its pictures" in measured
    assert "never evaluated" not in measured
    bare = documents(
        content=b"bare", report=None, metrics={}, gates=(), passed=None, card={"license": None, "base": ""}
    )
    assert "never evaluated" in bare["model-card.md"].decode()
    assert "licence is unknown" in bare["model-card.md"].decode()


def test_an_adapter_from_elsewhere_has_its_documents_too(versions):
    artifact = versions.store.put_files("adapter", {"adapter.safetensors": b"from elsewhere"})
    version = versions.register("stranger", artifact)
    records = find_records(versions.lineage, version)
    said = json.loads(read_document(versions.store, records, version, "provenance.json"))
    assert said["predicate"]["buildDefinition"]["buildType"] == "urn:loraline:import:1"
    assert schema_problem(read_document(versions.store, records, version, "ml-bom.json")) is None


def test_report_that_is_no_report_does_not_keep_a_version_from_being_registered(versions, make):
    other = versions.store.put_files("report", {"report.json": b"\xff not JSON"})
    assert gather_facts(versions, make(report=other)).report == {}


def test_mlflow_shows_documents_description_and_datasets(mirrored, register, home):
    from mlflow import MlflowClient

    version = register(mirrored, b"weights", alias_request="candidate")
    client = MlflowClient(tracking_uri=home.mlflow_url, registry_uri=home.mlflow_url)
    documents = {entry.path for entry in client.list_artifacts(version.mlflow_run_id, "documents")}
    assert {f"documents/{file}" for kind in (CARD, PROVENANCE, BOM) for file in FILES[kind]} <= documents
    assert "documents/report.html" in documents, "those that were given are shown beside those that are written"
    shown = client.get_model_version("zorb", "1")
    assert shown.description.startswith("**Zorb**")
    assert "documents/model-card.html" in shown.description
    assert client.get_registered_model("zorb").description == shown.description
    run = client.get_run(version.mlflow_run_id)
    assert run.data.tags["mlflow.note.content"] == shown.description
    (dataset,) = [entry for entry in run.inputs.dataset_inputs if entry.dataset.name == "dataset"]
    tags = {tag.key: tag.value for tag in dataset.tags}
    (execution,) = [entry for entry in mirrored.lineage.executions(version.run_id) if entry.step == "adapter"]
    assert tags["loraline.sha256"] == execution.inputs["dataset"].sha256
    assert tags["loraline.sha256"].startswith(dataset.dataset.digest)


def test_a_version_whose_report_is_gone_does_not_keep_the_others_from_mlflow(mirrored, register, monkeypatch, caplog):
    monkeypatch.setattr("registry.versions.versions.write_missing", lambda *_arguments: None)
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    lost, kept = register(mirrored, b"lost"), register(mirrored, b"kept", name="star")
    monkeypatch.undo()
    mirrored.store.blobs.path(lost.report.sha256).unlink()
    mirrored.sync()
    assert mirrored.show("star").mlflow_run_id
    assert mirrored.show("zorb").mlflow_run_id
    assert "zorb@1" in caplog.text
    assert find_records(mirrored.lineage, kept)
    assert not find_records(mirrored.lineage, lost)


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
