"""Ingest copies statements about images from table and files to the manifest, and leaves revoked images out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lora_engine.data.consent import read_consent
from lora_engine.data.evidence import read_evidence
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError
from lora_engine.files import sha256_file
from registry.errors import RightsError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.revocations import read_revoked
from registry.versions.revocation import lift, revoke
from registry.versions.versions import Versions
from tasks.execution import execute
from tasks.job import prepare_job
from tasks.steps.caption import Caption
from tasks.steps.ingest import Ingest
from tasks.steps.preprocess import Preprocess
from tests.lora_engine.data.corpus.build import png, zipped

HEADER = "file,consent,owner,license,rights,person,scope,expires,revocable,source,opt_out,ai_generated\n"
COMPLETE = (
    HEADER + "0.png,C-1,Ada,cc-by-4.0,consent,yes,commercial,2031-12-31,yes,a shoot,ai.txt/2026-05-01/clear,no\n"
    "1.png,,,,own,no,,,,,,\n"
)


def draw(path: Path, seed: int = 0, **saved: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path, **saved)
    return path


@pytest.fixture
def images(tmp_path):
    for index in range(3):
        draw(tmp_path / "images" / f"{index}.png", index)
    return tmp_path / "images"


def table(tmp_path, text):
    path = tmp_path / "consent.csv"
    path.write_text(text)
    return path


def test_all_statements_are_in_the_manifest(images, tmp_path):
    ingest(images, tmp_path / "out", IngestSettings(), consent=table(tmp_path, COMPLETE))
    first, second, third = Manifest.load(tmp_path / "out").pictures
    assert first.consent == "C-1"
    assert first.rights.model_dump(mode="json") == {
        "owner": "Ada",
        "license": "cc-by-4.0",
        "rights": "consent",
        "person": True,
        "scope": "commercial",
        "expires": "2031-12-31",
        "revocable": True,
        "source": "a shoot",
        "opt_out": {"tool": "ai.txt", "checked": "2026-05-01", "result": "clear"},
        "ai_generated": False,
        "evidence": [],
    }
    assert (second.consent, second.rights.rights, second.rights.person) == (None, "own", False)
    assert (third.consent, third.rights) == (None, None)


def test_an_image_without_statements_has_no_rights_in_the_manifest(images, tmp_path):
    ingest(images, tmp_path / "out", IngestSettings())
    assert b"rights" not in (tmp_path / "out" / "manifest.json").read_bytes()


def test_an_old_manifest_is_still_readable(images, tmp_path):
    ingest(images, tmp_path / "out", IngestSettings())
    path = tmp_path / "out" / "manifest.json"
    old = json.loads(path.read_bytes())
    assert all("rights" not in image for image in old["pictures"])
    assert len(Manifest.load(tmp_path / "out").pictures) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,consent,expires\n0.png,C-1,31.12.2030\n", "csv:2, column 3 .expires.: '31.12.2030' is not a day"),
        ("file,person\n0.png,maybe\n", "csv:2, column 2 .person.: 'maybe' is neither yes nor no"),
        ("file,rights\n0.png,stolen\n", "csv:2, column 2 .rights.: rights 'stolen' cannot be used"),
        ("file,scope\n0.png,all\n", "scope 'all'"),
        ("file,opt_out\n0.png,ai.txt\n", "opt_out 'ai.txt'"),
        ("file,opt_out\n0.png,ai.txt/2026-01-01/perhaps\n", "opt_out"),
        ("file,consent,expirs\n0.png,C-1,2030-01-01\n", "unknown column 'expirs'"),
        ("file,owner\n0.png," + "x" * 201 + "\n", "owner has 201 characters"),
        ("file,owner\n0.png,\n", "csv:2: the row needs a file and a consent id, or a value in another column"),
    ],
)
def test_an_invalid_statement_stops_the_run(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_consent(table(tmp_path, text))


def test_british_spelling_and_other_columns_are_accepted(tmp_path):
    stated = read_consent(table(tmp_path, "file,Licence,remarks\n0.png,cc0-1.0,nice\n"))
    assert stated["0.png"].rights.license == "cc0-1.0"


def xmp(kind: str) -> bytes:
    source = f"http://cv.iptc.org/newscodes/digitalsourcetype/{kind}"
    return f'<rdf:Description Iptc4xmpExt:DigitalSourceType="{source}"/>'.encode()


def chunks(**texts: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return info


def exif(comment: bytes) -> Image.Exif:
    tags = Image.Exif()
    tags.get_ifd(0x8769)[0x9286] = comment
    return tags


TRAINED = "digital-source-type-trained-algorithmic-media"
COMFY = {"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": '{"nodes": []}'}


@pytest.mark.parametrize(
    ("name", "saved", "evidence"),
    [
        ("a.png", lambda: {"pnginfo": chunks(parameters="a cat\nSteps: 20")}, ("a1111-parameters",)),
        ("a.png", lambda: {"pnginfo": chunks(**COMFY)}, ("comfyui-prompt", "comfyui-workflow")),
        ("a.png", lambda: {"pnginfo": chunks(prompt="write soon", workflow="mine")}, ()),
        ("a.jpg", lambda: {"exif": exif(b"UNICODE\0" + "a cat\nSteps: 20".encode("utf-16-be"))}, ("a1111-parameters",)),
        ("a.jpg", lambda: {"exif": exif(b"ASCII\0\0\0a holiday")}, ()),
        ("a.jpg", lambda: {"xmp": xmp("trainedAlgorithmicMedia")}, (TRAINED,)),
        ("a.webp", lambda: {"xmp": xmp("trainedAlgorithmicMedia")}, (TRAINED,)),
        (
            "a.jpg",
            lambda: {"xmp": xmp("compositeWithTrainedAlgorithmicMedia")},
            ("digital-source-type-composite-with-trained-algorithmic-media",),
        ),
        ("a.jpg", lambda: {"xmp": xmp("digitalCapture")}, ()),
        ("a.png", dict, ()),
    ],
)
def test_signs_of_generation_are_found(tmp_path, name, saved, evidence):
    path = draw(tmp_path / name, **saved())
    assert read_evidence(path, tmp_path) == evidence


def test_evidence_is_in_the_manifest_and_metadata_is_in_no_artifact(tmp_path):
    location = Image.Exif()
    location[0x8825] = {1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0)}
    location[0x010F] = "SECRET-CAMERA"
    draw(
        tmp_path / "images" / "gps.jpg",
        1,
        exif=location,
        xmp=xmp("trainedAlgorithmicMedia") + b"SECRET-XMP",
        comment=b"SECRET",
    )
    draw(tmp_path / "images" / "made.png", 2, pnginfo=chunks(parameters="SECRET-PROMPT Steps: 20"))
    ingest(tmp_path / "images", tmp_path / "out", IngestSettings())
    evidence = {image.source: image.rights.evidence for image in Manifest.load(tmp_path / "out").pictures}
    assert evidence == {"gps.jpg": (TRAINED,), "made.png": ("a1111-parameters",)}
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert not any(word in path.read_bytes() for word in (b"SECRET", b"Exif", b"eXIf", b"xmp", b"tEXt"))
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert dict(image.getexif()) == {}
                assert image.info == {}
    # The original files do contain the metadata.
    assert b"SECRET" in (tmp_path / "images" / "gps.jpg").read_bytes()
    with Image.open(tmp_path / "images" / "gps.jpg") as image:
        assert image.getexif().get_ifd(0x8825)


def test_revoked_images_and_consents_are_quarantined_with_the_reason(images, tmp_path):
    revoked = ("C-1", sha256_file(images / "2.png"))
    manifest = ingest(images, tmp_path / "out", IngestSettings(), consent=table(tmp_path, COMPLETE), revoked=revoked)
    assert [image.source for image in manifest.pictures] == ["1.png"]
    assert {file.source: file.reason for file in manifest.quarantined} == {
        "0.png": "its consent 'C-1' was revoked",
        "2.png": "the image was revoked",
    }
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 1


@pytest.mark.parametrize(
    ("rows", "revoked", "used"),
    [
        ("0.png,C-1,own,\n", (), "C-1"),
        ("copy.png,C-1,own,\n", (), "C-1"),
        ("0.png,C-1,own,\ncopy.png,C-1,own,\n", (), "C-1"),
        ("0.png,C-1,own,\ncopy.png,C-2,own,\n", (), "different rights for the same image: 0.png and copy.png"),
        ("0.png,C-1,own,\ncopy.png,C-1,own,2020-01-01\n", (), "different rights"),
        ("0.png,C-1,own,\ncopy.png,C-2,own,\n", ("C-2",), "different rights"),
        ("copy.png,C-2,own,\n", ("C-2",), "its consent 'C-2' was revoked"),
    ],
)
def test_statements_about_every_copy_of_an_image_count(images, tmp_path, rows, revoked, used):
    shutil.copyfile(images / "0.png", images / "copy.png")
    stated = table(tmp_path, f"file,consent,rights,expires\n{rows}")
    manifest = ingest(images, tmp_path / "out", IngestSettings(), consent=stated, revoked=revoked)
    entries = {image.source: image for image in manifest.pictures}
    reasons = {file.source: file.reason for file in manifest.quarantined}
    assert len(entries) + len(reasons) == 4
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == len(entries)
    if "0.png" in entries:
        assert (entries["0.png"].consent, entries["0.png"].rights.rights) == (used, "own")
    else:
        assert used in reasons["0.png"]


@pytest.fixture
def home(tmp_path):
    return Home.open(tmp_path / "state")


@pytest.fixture
def photos(home, images, tmp_path):
    """Returns a function that ingests the folder and returns (artifact, is cached, manifest)."""
    table(tmp_path, COMPLETE)

    def run():
        lineage = Lineage(home.lineage_url)
        spec = Ingest(images="images", consent="consent.csv")
        job = prepare_job("photos", spec, tmp_path, read_revoked(lineage))
        outcome = execute(job, {}, home, lineage.start_run("t", {}).id)
        lineage.close()
        opened = Versions(home)
        manifest = Manifest.model_validate_json(opened.store.read(outcome.ref, "manifest.json"))
        opened.close()
        return outcome.ref, outcome.cached, manifest

    return run


def test_a_revoked_image_is_not_used_from_an_archive(home, photos, images, tmp_path):
    revoked = (images / "1.png").rename(tmp_path / "elsewhere.png")
    (images / "x.zip").write_bytes(zipped({"2.png": revoked.read_bytes(), "3.png": png(9)}))
    first, _, manifest = photos()
    assert [image.source for image in manifest.pictures] == ["0.png", "2.png", "x.zip/2.png", "x.zip/3.png"]
    versions = Versions(home)
    revoke(versions, str(revoked), reason="r")
    _, cached, manifest = photos()
    assert not cached
    assert [image.source for image in manifest.pictures] == ["0.png", "2.png", "x.zip/3.png"]
    assert [item.reason for item in manifest.quarantined] == ["the image was revoked"]
    lift(versions, str(revoked), reason="r")
    assert photos()[:2] == (first, True)


def test_ingest_runs_again_after_a_revocation_and_uses_the_old_result_after_lifting(home, photos, images):
    first, _, _ = photos()
    assert photos()[1], "nothing changed"
    versions = Versions(home)
    revoke(versions, str(images / "1.png"), reason="r")
    second, cached, manifest = photos()
    assert not cached
    assert [image.source for image in manifest.pictures] == ["0.png", "2.png"]
    assert photos()[:2] == (second, True)
    lift(versions, str(images / "1.png"), reason="r")
    assert photos()[:2] == (first, True)


def test_a_revocation_of_another_image_does_not_invalidate_the_cache(home, photos):
    first, _, _ = photos()
    revoke(Versions(home), "f" * 64, reason="an image of another folder")
    assert photos()[:2] == (first, True)


def test_a_consent_stays_revoked_for_its_images_after_the_table_renames_it(home, photos, tmp_path):
    photos()
    revoke(Versions(home), "C-1", reason="r")
    table(tmp_path, COMPLETE.replace("C-1", "C-2"))
    assert "0.png" not in [image.source for image in photos()[2].pictures]


def test_only_relevant_revocations_change_the_key_of_a_step(home, images, tmp_path):
    table(tmp_path, COMPLETE)
    versions = Versions(home)
    spec = Ingest(images="images", consent="consent.csv")

    def excluded(step):
        return prepare_job("step", step, tmp_path, read_revoked(versions.lineage)).excluded

    assert excluded(spec) == ()
    for subject in (str(images / "2.png"), "f" * 64):
        revoke(versions, subject, reason="r")
    assert excluded(spec) == (sha256_file(images / "2.png"),)
    assert excluded(Caption(dataset="photos", captioner="files")) == ()


def test_a_step_does_not_run_if_its_dataset_was_revoked_meanwhile(home, photos, images, tmp_path):
    ref, _, _ = photos()
    versions = Versions(home)
    revoke(versions, str(images / "1.png"), reason="between the steps")
    run = versions.lineage.start_run("t", {})
    job = prepare_job("prepared", Preprocess(dataset="photos", resolution=16), tmp_path)
    with pytest.raises(RightsError, match="contains revoked items: image"):
        execute(job, {"dataset": (ref,)}, home, run.id)
    lift(versions, str(images / "1.png"), reason="r")
    assert execute(job, {"dataset": (ref,)}, home, run.id).ref.kind == "manifest"


YAML = """\
0.png: {consent_id: C-1, licence: cc-by-4.0, basis: consent, person_depicted: true, expiry: 2031-12-31}
1.png: {rights: own, person: no, opt-out: ai.txt/2026-05-01/clear}
"""


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_a_file_of_entries_states_what_a_table_states(tmp_path, suffix):
    entries = tmp_path / f"consent{suffix}"
    if suffix == ".json":
        entries.write_text(
            '{"0.png": {"consent": "C-1", "license": "cc-by-4.0", "rights": "consent", "person": "yes", "expires": '
            '"2031-12-31"}, "1.png": {"basis": "own", "person": false, "opt_out": "ai.txt/2026-05-01/clear"}}'
        )
    else:
        entries.write_text(YAML)
    rows = "0.png,C-1,cc-by-4.0,consent,yes,2031-12-31,\n1.png,,,own,no,,ai.txt/2026-05-01/clear\n"
    expected = read_consent(table(tmp_path, "image,consent_id,licence,basis,person_depicted,expiry,opt-out\n" + rows))
    assert read_consent(entries) == expected
    assert expected["0.png"].consent == "C-1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 0.png\n", "the file contains a list"),
        ("0.png: yes\n", "yaml:1:1: '0.png' has 'yes'"),
        ("0.png: {}\n", "yaml:1:1: the row needs a file and a consent id, or a value in another column"),
        ("0.png: {ownr: Ada}\n", "yaml:1:9: unknown column 'ownr'.*did you mean 'owner'"),
        ("0.png: {license: MIT, licence: MIT}\n", "'licence' has the meaning of another column"),
        ("0.png: {expires: 31.12.2030}\n", "'31.12.2030' is not a day"),
        ("0.png: {person: maybe}\n", "yaml:1:9: 'maybe' is neither yes nor no"),
        ("0.png: {owner: [a, b]}\n", "the value is"),
        ("0.png: {owner: Ada}\n0.png: {owner: Bob}\n", "duplicate key"),
        ("' ': {owner: Ada}\n", "the row needs a file"),
    ],
)
def test_an_invalid_entry_is_refused_with_its_place(tmp_path, text, message):
    path = tmp_path / "consent.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_consent(path)
