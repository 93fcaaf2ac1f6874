"""Laws of the families: what a new folder has to keep, without a test of its own."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re

import huggingface_hub.constants
import pytest
import torch
import yaml
from law_families import SIZES, TABLES, modules_of, narrow, size_of

from flows.template import write_template
from lora_engine.adapters import Adapter, LoraDelta, select_modules
from lora_engine.adapters.published import empty_module
from lora_engine.adapters.tree import DictTree, module_shapes
from lora_engine.bases.defaults import training_defaults
from lora_engine.bases.flow import FlowModel
from lora_engine.families import families, published
from lora_engine.families.proof import recognize_family
from lora_engine.families.training_defaults import TrainingDefaults
from lora_engine.formats import codecs, read_adapter, write_adapter
from registry.policy.licenses import read_licenses
from tasks.steps.train import Train

SUPPORTED = [name for name, family in families.items() if family.is_supported]
TRANSFORMERS = [name for name in SUPPORTED if families[name].names is not None]
PUBLISHED = [entry.name for entry in published.values() if "transformer" in entry.components]
WRITTEN = [name for name, codec in codecs.items() if not codec.format.families and name not in ("bfl", "xlabs")]
EQUAL_SHAPES = {"chroma": {"flux", "chroma"}, "ltx_video": {"ltx_video", "ltx2"}, "sana": {"sana", "sana_video"}}
"""Families whose whole files do not prove them: another family has all their modules."""


def flattened(modules):
    return {path.replace(".", "_"): shape for path, shape in modules}


@pytest.mark.parametrize(("name", "size"), SIZES)
@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "original"])
def test_a_whole_file_proves_its_family_or_the_equal_one_is_declared(name, size, original):
    modules = flattened(modules_of(families[name], size_of(name, size), original=original))
    assert len(modules) > 30
    found = recognize_family(modules)
    assert set(found.families) <= EQUAL_SHAPES.get(name, {name})
    assert name in found.families, found


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_a_part_of_a_file_is_never_taken_for_another_family(name, size):
    modules = flattened(modules_of(families[name], size_of(name, size)))
    for module, shape in modules.items():
        if re.search(r"_[1-9]\d*_", module):
            continue  # one block of each list
        assert name in recognize_family({module: shape}).families, module


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_one_block_or_one_row_too_many_is_no_proof_of_the_size(name, size):
    family, known = families[name], size_of(name, size)
    blocks = next(iter(known.blocks))
    modules = flattened(modules_of(family, known))
    beyond = next(module for module in modules if module.startswith(f"{blocks.replace('.', '_')}_0_"))
    wide = {**modules, beyond: (modules[beyond][0] + 1, modules[beyond][1])}
    deep = {**modules, beyond.replace("_0_", "_999_", 1): modules[beyond]}
    for changed in (wide, deep):
        assert name not in recognize_family(changed).families


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tables_have_every_layer_of_the_published_transformer_both_ways(name):
    architecture = published[name]
    family = families[architecture.family]
    shapes = module_shapes(DictTree({"transformer": empty_module(architecture.components["transformer"])}))
    linear = {path.removeprefix("transformer."): shape for path, shape in shapes.items() if len(shape) > 1}
    for path in linear:
        target = family.names.original_of(path)
        assert target is not None, path
        assert path in target.parts
        assert family.names.find(target.original) == target
        assert family.names.find(target.original.replace(".", "_"), "_") == target
        assert family.names.find_canonical(path.replace(".", "_"), "_") == path
    flat_shapes = {path.replace(".", "_"): (shape[0], torch.Size(shape[1:]).numel()) for path, shape in linear.items()}
    assert recognize_family(flat_shapes).families == (family.name,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_select_layers_of_the_blocks(name):
    shapes = module_shapes(DictTree({"transformer": empty_module(published[name].components["transformer"])}))
    selected = {
        preset: set(select_modules(shapes, preset)) for preset in ("attention", "attention+ff", "linear", "all")
    }
    assert selected["attention"] < selected["attention+ff"] <= selected["linear"] <= selected["all"] < set(shapes)
    assert all(len(shapes[module]) > 1 for module in selected["all"])


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("form", WRITTEN)
def test_every_format_gives_an_adapter_of_every_transformer_back(name, form, tmp_path):
    family = families[name]
    draw = torch.Generator().manual_seed(0)
    modules = {
        f"transformer.{path}": LoraDelta(
            torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw), 1.0
        )
        for path, (rows, columns) in modules_of(family, narrow(family.sizes[0]))
    }
    adapter = Adapter(modules, name)
    write_adapter(tmp_path, adapter, format=form)
    back, _ = read_adapter(tmp_path)
    assert back.base == name
    assert list(back.modules) == list(adapter.modules)
    for path, delta in adapter.modules.items():
        weight = torch.zeros(delta.up.shape[0], delta.down.shape[1])
        torch.testing.assert_close(back.modules[path].delta_weight(weight), delta.delta_weight(weight))


@pytest.mark.parametrize("name", TABLES)
def test_headers_name_one_family(name):
    family = families[name]
    stated = [version.version for version in family.versions]
    stated += [version.architecture.partition("/")[0] for version in family.versions]
    for text in stated:
        plain = re.sub(r"[-. ]", "_", text.lower())
        assert [other for other, entry in families.items() if entry.header and re.fullmatch(entry.header, plain)] == [
            name
        ]
    assert stated or not family.is_supported


@pytest.mark.parametrize("name", SUPPORTED)
def test_pipelines_exist_in_diffusers_and_have_a_loader(name):
    import diffusers

    for pipeline in families[name].pipelines:
        module, _, loader = pipeline.loader.partition(":")
        assert callable(getattr(importlib.import_module(module), loader))
        accepted = inspect.signature(getattr(diffusers, pipeline.name).__init__).parameters
        assert set(pipeline.components) <= set(accepted)
        assert set(pipeline.optional) <= set(pipeline.components)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_family_is_a_flow_exactly_if_its_models_are(name):
    for pipeline in families[name].pipelines:
        module, _, loader = pipeline.loader.partition(":")
        assert issubclass(getattr(importlib.import_module(module), loader), FlowModel) == families[name].is_flow


@pytest.fixture
def hub_id(tmp_path, monkeypatch):
    """Returns a function that caches the configuration of a base, without weights, and returns its hub id."""

    def cache(index, configs):
        snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40)
        for path, content in {"model_index.json": index, **configs}.items():
            (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / path).write_text(json.dumps(content))
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        return "org/name"

    return cache


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_written_pipeline_has_the_training_defaults_of_the_family_and_explains_each(name, hub_id, tmp_path):
    defaults = families[name].training
    path = write_template(tmp_path / "new", hub_id({"_class_name": families[name].pipelines[0].name}, {}))
    steps, lines = yaml.safe_load(path.read_text())["steps"], path.read_text().splitlines()
    train, resolution = Train.model_validate(steps["adapter"] | {"base": name}), steps["prepared"]["resolution"]
    assert (resolution, resolution % 64) == (defaults.resolution, 0)
    for field in dataclasses.fields(TrainingDefaults):
        if field.name in ("resolution", "reasons"):
            continue
        place = train.running if field.name == "gradient_checkpointing" else train
        assert getattr(place, field.name) == getattr(defaults, field.name)
    for setting in (field.name for field in dataclasses.fields(TrainingDefaults) if field.name != "reasons"):
        (line,) = [line for line in lines if line.strip().startswith(f"{setting}:")]
        assert len(line.partition(" # ")[2]) > 5, line
        assert len(line) <= 120
    assert set(defaults.reasons) <= {field.name for field in dataclasses.fields(TrainingDefaults)}
    if families.plugin(name) is None:
        assert set(defaults.reasons) >= {"resolution", "learning_rate", "rank", "gradient_checkpointing"}


@pytest.mark.parametrize("name", list(published))
def test_training_defaults_fit_the_published_bases(name, hub_id):
    architecture = published[name]
    parts = {part: dict(entry.config) for part, entry in architecture.components.items() if part in ("unet", "vae")}
    configs = {f"{part}/config.json": config for part, config in parts.items()}
    defaults = training_defaults(hub_id({"_class_name": architecture.pipeline}, configs))
    if "unet" in parts:
        assert defaults.resolution == parts["unet"]["sample_size"] * 8
    if defaults.gradient_checkpointing:
        network = architecture.components["unet" if "unet" in architecture.components else "transformer"]
        import diffusers

        assert getattr(diffusers, network.class_name)._supports_gradient_checkpointing


@pytest.mark.parametrize("name", list(families))
def test_licenses_and_formats_that_a_family_names_exist(name):
    family = families[name]
    assert all(read_licenses().find(license_id) for license_id in family.licenses)
    assert set(family.written) <= set(codecs)
    assert set(family.other_names) <= set(codecs)
    assert bool(family.licenses) == family.is_supported
    assert family.names is None or family.sizes
    assert family.is_supported or not family.published


@pytest.mark.parametrize("name", list(published))
def test_every_published_base_has_a_license(name):
    terms = read_licenses().terms_of_base(name)
    assert not terms.unknown
    assert terms.licenses <= set(families[published[name].family].licenses)


def test_every_hub_id_has_one_license():
    names = [name.lower() for family in families.values() for listed in family.licenses.values() for name in listed]
    assert sorted(names) == sorted(set(names))
