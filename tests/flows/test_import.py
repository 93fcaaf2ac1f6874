"""Tests imports of adapter files: validation, original bytes, stated license, lineage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli import app
from flows.spec import load_spec
from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.bases.structure import base_module_shapes
from lora_engine.catalog.formats import FORMATS, written_formats
from lora_engine.errors import AdapterError
from lora_engine.files import sha256_file
from lora_engine.formats import Card, codecs, read_bundle, write_adapter
from lora_engine.formats.embeddings import Embedding
from lora_engine.formats.safetensors_io import read_header
from registry import event_log
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.licenses import read_licenses
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.operations.import_adapter import import_adapter
from tasks.operations.import_request import ImportRequest
from tests.flows.made import bring_in, random_adapter, run_line, write_random


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


@pytest.fixture
def opened(home: Path) -> Home:
    return Home.open(home)


def say(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.mark.parametrize("form", sorted(name for name in codecs if name not in ("bfl", "cloneofsimo", "xlabs")))
def test_an_adapter_of_any_format_keeps_its_effect(opened: Home, tmp_path: Path, form: str) -> None:
    path = tmp_path / ("file" if codecs[form].format.is_folder else "file.safetensors")
    write_random(path, 0, form=form)
    result = bring_in(opened, path, "foreign")
    versions = Versions(opened)
    out = tmp_path / "back.safetensors"
    versions.checkout_adapter(result.version, out)
    bundle = read_bundle(out)
    from lora_engine.merging.compare import compare_adapters

    assert compare_adapters(random_adapter(0), bundle.adapter).relative == pytest.approx(0.0, abs=1e-6)
    assert (result.version.ref, result.version.passed, result.version.gates) == ("foreign@1", None, ())
    assert (bundle.card.license, bundle.card.base, bundle.adapter.base) == ("MIT", "tiny", "sd")
    assert result.version.parents == ("base:tiny",)
    files = versions.store.files(result.artifact)
    assert {name: entry.sha256 for name, entry in files.items()} == dict(result.original)


def test_a_pickled_file_is_read_by_the_child_and_its_bytes_are_kept(opened: Home, tmp_path: Path) -> None:
    tensors = load_file(write_random(tmp_path / "k.safetensors", 0))
    torch.save(tensors, tmp_path / "k.pt")
    result = bring_in(opened, tmp_path / "k.pt", "pickled")
    assert result.original == {"k.pt": sha256_file(tmp_path / "k.pt")}


def test_assumptions_are_in_the_card(opened: Home, tmp_path: Path) -> None:
    write_random(tmp_path / "folder", 0, form="peft")
    lone = (tmp_path / "folder" / "adapter_model.safetensors").rename(tmp_path / "lone.safetensors")
    result = bring_in(opened, lone, "lone")
    Versions(opened).checkout_adapter(result.version, tmp_path / "back.safetensors")
    card = read_bundle(tmp_path / "back.safetensors").card
    assert card.recipe["imported"]["assumed"] == read_bundle(lone).assumptions != ""


def test_the_header_is_kept_and_statements_of_the_user_win(opened: Home, tmp_path: Path) -> None:
    path = write_random(tmp_path / "k.safetensors", 0)
    header = {"ss_output_name": "Zorb", "modelspec.license": "MIT", "modelspec.trigger_phrase": "old", "ss_tag": "x"}
    save_file(load_file(path), path, header)
    imported = json.loads(
        say(
            "import",
            path,
            "--name",
            "foreign",
            "--base",
            "tiny",
            "--license",
            "apache-2.0",
            "--trigger",
            "new",
            "--json",
        )
    )
    card = imported["card"]
    assert (card["title"], card["license"], card["trigger"]) == ("Zorb", "Apache-2.0", "new")
    assert card["extra"]["ss_tag"] == "x"
    say("export", "foreign@1", "--to", "kohya", "-o", tmp_path / "out.safetensors")
    exported = json.loads(say("inspect", tmp_path / "out.safetensors", "--json"))
    assert exported["metadata"]["modelspec.license"] == "Apache-2.0"
    assert exported["metadata"]["ss_tag"] == "x"


@pytest.mark.parametrize(("form", "name"), [("loraline", "file.safetensors"), ("kohya", "folder")])
def test_learned_tokens_in_or_beside_the_file_are_imported(opened: Home, tmp_path: Path, form: str, name: str) -> None:
    token = Embedding("sks", {"text_encoder": torch.ones(1, base_width())})
    write_adapter(tmp_path / name, random_adapter(0), format=form, embeddings=[token])
    result = bring_in(opened, tmp_path / name, "bundle")
    out = tmp_path / "back.safetensors"
    Versions(opened).checkout_adapter(result.version, out)
    assert read_bundle(out).embeddings == (token,)


def base_width() -> int:
    return base_module_shapes("tiny")["text_encoder.text_model.embeddings.token_embedding"][1]


def test_the_same_bytes_are_the_same_version_and_another_license_is_another(opened: Home, tmp_path: Path) -> None:
    path = write_random(tmp_path / "k.safetensors", 0)
    first = bring_in(opened, path, "foreign")
    again = bring_in(opened, path.rename(tmp_path / "renamed.safetensors"), "foreign")
    assert (first.is_new, again.is_new) == (True, False)
    assert again.version == first.version
    relicensed = bring_in(opened, tmp_path / "renamed.safetensors", "foreign", license_id="Apache-2.0")
    assert relicensed.version.version == 2
    with Versions(opened).lineage.database.read() as session:
        events = [(event.action, event.after) for event in event_log.read_events(session, "foreign")]
    assert events == [("import", 1), ("import", 2)]


def test_lineage_leads_from_the_digest_of_the_file_to_the_version_and_back(opened: Home, tmp_path: Path) -> None:
    path = write_random(tmp_path / "k.safetensors", 0)
    result = bring_in(opened, path, "foreign")
    lineage = Lineage(opened.lineage_url)
    assert "foreign@1" in {node.id for node in lineage.walk(sha256_file(path), "down").nodes}
    assert result.artifact.sha256 in {node.id for node in lineage.walk("foreign@1").nodes}
    (run,) = lineage.runs()
    assert (run.name, run.status, result.version.run_id) == ("import", "COMPLETED", run.id)


def test_a_license_must_be_in_the_table_or_noassertion(opened: Home, tmp_path: Path) -> None:
    path = write_random(tmp_path / "k.safetensors", 0, card=Card(title="Zorb", license="Foo-1"))
    result = CliRunner().invoke(app, ["import", str(path), "--name", "foreign", "--base", "tiny"])
    assert isinstance(result.exception, SpecError)
    assert "Foo-1" in str(result.exception)
    with pytest.raises(SpecError, match=r"Apache-2\.0"):
        bring_in(opened, path, "foreign", license_id="Foo-1")
    with pytest.raises(SpecError, match="not in the table"):
        bring_in(opened, path, "foreign", license_id="noassertion")
    assert Versions(opened).list() == ()
    assert bring_in(opened, path, "foreign", license_id="NOASSERTION").version.card["license"] == "NOASSERTION"


def test_an_alias_with_gates_is_refused_with_its_reason_and_exit_code_1(opened: Home, tmp_path: Path) -> None:
    path = write_random(tmp_path / "k.safetensors", 0)
    imported = json.loads(
        say("import", path, "--name", "f", "--base", "tiny", "--license", "MIT", "--alias", "staging", "--json", code=1)
    )
    assert "gates were not run" in imported["refused"]
    assert imported["aliases"] == []
    free = json.loads(
        say("import", path, "--name", "f", "--base", "tiny", "--license", "MIT", "--alias", "trial", "--json")
    )
    assert (free["is_new"], free["aliases"]) == (False, ["trial"])


Damage = Callable[[dict[str, torch.Tensor]], None]


def broken_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(tensor for tensor in tensors.values() if tensor.dim())[0] = float("nan")


def broken_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("lora_down.weight"))
    tensors[name] = torch.zeros(2, 7)


def broken_names(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"what.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "problem"), [(broken_nan, "NaN"), (broken_shape, "shape"), (broken_names, "adapter format")]
)
def test_an_invalid_file_is_refused_and_nothing_is_registered(
    opened: Home, tmp_path: Path, damage: Damage, problem: str
) -> None:
    path = write_random(tmp_path / "k.safetensors", 0)
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=problem):
        bring_in(opened, path, "foreign")
    lineage = Lineage(opened.lineage_url)
    assert (Versions(opened).list(), lineage.runs()) == ((), [])
    assert list(opened.work.iterdir()) == []


def test_a_file_for_another_base_is_refused(opened: Home, tmp_path: Path) -> None:
    adapter = random_adapter(0)
    path = tmp_path / "a.safetensors"
    write_adapter(path, Adapter(adapter.modules, "sd", "0" * 64))
    with pytest.raises(AdapterError, match="0000"):
        bring_in(opened, path, "foreign")
    with pytest.raises(AdapterError, match=r"the base's weight \[320, 32"):
        import_adapter(opened, write_random(tmp_path / "k.safetensors", 0), ImportRequest("foreign", "sd15", "MIT"))


def test_a_version_is_exported_in_every_format_as_a_file_or_a_folder(opened: Home, tmp_path: Path) -> None:
    result = bring_in(opened, write_random(tmp_path / "k.safetensors", 0), "foreign")
    for form in (name for name in codecs if name not in ("bfl", "xlabs")):
        base = ["--base", "tiny"] if form == "cloneofsimo" else []
        out = tmp_path / form
        exported = json.loads(say("export", "foreign@1", "--to", form, "-o", out, "--json", *base))
        assert exported["sha256"] == result.version.sha256
        assert (
            [entry["sha256"] for entry in exported["files"]]
            == [sha256_file(Path(e["file"])) for e in exported["files"]]
            != []
        )
        assert out.is_dir()
        (expected,) = [Path(entry["file"]) for entry in exported["files"] if entry["file"].endswith(".safetensors")]
        assert expected.name == ("foreign-v1.safetensors" if FORMATS[form].is_renamable else FORMATS[form].file_name)
    file = tmp_path / "half.safetensors"
    output = say("export", "foreign@1", "--to", "kohya", "-o", file, "--dtype", "float16")
    assert output.split() == [str(file), "sha256", sha256_file(file)]
    factors = {
        name: tensor for name, tensor in load_file(file).items() if name.endswith(("_down.weight", "_up.weight"))
    }
    assert {tensor.dtype for tensor in factors.values()} == {torch.float16}


def test_exports_into_one_folder_keep_each_other_and_say_what_browsers_of_models_show(
    opened: Home, tmp_path: Path
) -> None:
    for seed in (0, 1):
        file = write_random(tmp_path / f"{seed}.safetensors", seed)
        import_adapter(opened, file, ImportRequest("foreign", "tiny", "MIT", trigger="sks"))
        say("export", f"foreign@{seed + 1}", "--to", "kohya", "-o", tmp_path / "Lora")
    written = sorted((tmp_path / "Lora").iterdir())
    assert [path.name for path in written] == ["foreign-v1.safetensors", "foreign-v2.safetensors"]
    for path in written:
        header = read_header(path)[1]
        assert (header["ss_output_name"], header["modelspec.title"]) == (path.stem, "foreign")
        assert header["modelspec.trigger_phrase"] == "sks"
        assert header["modelspec.license"] == "Apache-2.0 AND MIT"  # that of the base, too
        assert header["ss_sd_model_name"] == "tiny"
        body = path.read_bytes()
        body = body[8 + int.from_bytes(body[:8], "little") :]
        digest = hashlib.sha256(body).hexdigest()
        assert (header["sshs_model_hash"], header["modelspec.hash_sha256"]) == (digest, f"0x{digest}")


def test_a_base_in_a_folder_is_known_by_its_fingerprint_and_not_by_its_name(opened: Home, tmp_path: Path) -> None:
    from lora_engine.bases.tiny import folder

    base = shutil.copytree(folder(), tmp_path / "sdxl")
    config = base / "scheduler" / "scheduler_config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    write_random(tmp_path / "a.safetensors", 0)
    say("import", tmp_path / "a.safetensors", "--name", "a", "--base", base, "--license", "MIT")
    shown = json.loads(say("show", "a@1", "--json"))
    fingerprint = shown["card"]["base_fingerprint"]
    assert shown["rights"]["terms"]["unknown"] == [f"base 'sdxl' with fingerprint {fingerprint}"]
    table = f"date: 2026-11-01\nbases: [{{license: cc-by-nc-4.0, fingerprints: [{fingerprint}]}}]\n"
    (opened.path / "licenses.yaml").write_text(table)
    terms = json.loads(say("show", "a@1", "--json"))["rights"]["terms"]
    assert (terms["licenses"], terms["unknown"]) == (["CC-BY-NC-4.0", "MIT"], [])


@pytest.mark.parametrize(
    ("first", "second", "stated"),
    [
        ("mit", "MIT", "MIT"),
        ("mit", "cc-by-nc-4.0", "CC-BY-NC-4.0 AND MIT"),
        ("mit or isc", "cc-by-nc-4.0", "CC-BY-NC-4.0 AND (MIT OR ISC)"),
        ("mit", "NOASSERTION", "MIT AND NOASSERTION"),
    ],
)
def test_a_merged_file_states_the_licenses_of_all_adapters(
    opened: Home, tmp_path: Path, first: str, second: str, stated: str
) -> None:
    for seed, license_id in enumerate((first, second)):
        file = write_random(tmp_path / f"{seed}.safetensors", seed)
        import_adapter(opened, file, ImportRequest(f"a{seed}", "tiny", license_id))
    say("merge", "a0@1", "a1@1", "-o", tmp_path / "out.safetensors")
    assert read_header(tmp_path / "out.safetensors")[1]["modelspec.license"] == stated
    say("merge", "a0@1", write_random(tmp_path / "bare.safetensors", 2), "-o", tmp_path / "out.safetensors")
    assert "modelspec.license" not in read_header(tmp_path / "out.safetensors")[1]


@pytest.mark.parametrize("claimed", ["a" * 64, read_licenses().bases[-1].fingerprints[0]])
def test_the_fingerprint_that_a_header_claims_gives_a_published_base_no_other_license(
    opened: Home, tmp_path: Path, claimed: str
) -> None:
    shapes = base_module_shapes("sd15")
    name = next(name for name in shapes if ".attn1.to_q" in name)
    delta = LoraDelta(torch.ones(1, shapes[name][1]), torch.ones(shapes[name][0], 1), 1.0)
    write_adapter(tmp_path / "a.safetensors", Adapter({name: delta}, "sd", claimed))
    result = import_adapter(opened, tmp_path / "a.safetensors", ImportRequest("a", "sd15", "MIT"))
    assert result.version.card["base_fingerprint"] is None
    terms = json.loads(say("show", "a@1", "--json"))["rights"]["terms"]
    assert terms["licenses"] == ["LicenseRef-CreativeML-OpenRAIL-M", "MIT"]


@pytest.mark.parametrize("form", written_formats())
def test_every_exported_file_states_the_inherited_license(opened: Home, tmp_path: Path, form: str) -> None:
    token = Embedding("sks", {"text_encoder": torch.ones(1, base_width())})
    write_adapter(tmp_path / "a.safetensors", random_adapter(0), embeddings=[token], card=Card(license="MIT"))
    say("import", tmp_path / "a.safetensors", "--name", "a", "--base", "tiny", "--license", "cc-by-2.0 AND isc")
    say("export", "a@1", "--to", form, "--base", "tiny", "-o", tmp_path / "out")
    written = list((tmp_path / "out").rglob("*.safetensors"))
    assert written
    for path in written:
        assert read_header(path)[1]["modelspec.license"] == "Apache-2.0 AND CC-BY-2.0 AND ISC", path.name


@pytest.mark.parametrize("name", ["out.pt", "taken", "folder.safetensors"])
def test_an_output_with_the_suffix_of_another_kind_is_refused(opened: Home, tmp_path: Path, name: str) -> None:
    bring_in(opened, write_random(tmp_path / "k.safetensors", 0), "foreign")
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    result = CliRunner().invoke(app, ["export", "foreign@1", "--to", "kohya", "-o", str(tmp_path / name)])
    assert isinstance(result.exception, SpecError)
    assert (tmp_path / "taken").read_text() == "mine"


EVALUATE = """\
name: foreign
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/, heldout: 0.5}
  captions: {uses: caption, dataset: photos, captioner: template, trigger: sks, class_word: star}
  report:
    uses: evaluate
    adapter: foreign@1
    dataset: captions
    seeds: 1
    steps: 1
    max_pictures: 1
    gates: {validation_loss: {max: 10.0}}
  release:  {uses: register, adapter: foreign@1, report: report, alias: trial}
"""


def test_a_registered_adapter_may_be_evaluated_and_registered_by_name(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = tmp_path / "line.yaml"
    path.write_text(EVALUATE)
    spec = load_spec(path)
    assert ("adapter", "foreign@1", "adapter") in list(spec.steps["report"].references())
    assert ("adapter", "foreign@1", "adapter") in list(spec.steps["release"].references())


def test_an_imported_version_gets_its_gates_from_a_pipeline_and_keeps_license_and_parents(
    opened: Home, tmp_path: Path
) -> None:
    from tests.flows.conftest import draw_noise

    first = bring_in(opened, write_random(tmp_path / "k.safetensors", 0), "foreign").version
    (tmp_path / "images").mkdir()
    for index in range(4):
        draw_noise(tmp_path / "images" / f"{index}.png", index)
    path = tmp_path / "line.yaml"
    path.write_text(EVALUATE)
    second = run_line(path, opened)
    assert (second.ref, second.passed, second.sha256) == ("foreign@2", True, first.sha256)
    assert (second.card["license"], second.parents) == ("MIT", first.parents)
    assert second.aliases == ("trial",)
