"""Tests the options of merge steps in pipeline files, and their part in the cache key."""

import pytest

from flows.spec import load_spec
from tasks.errors import SpecError
from tasks.job import prepare_job

UPSTREAM = """
  one: {uses: train, dataset: captions, steps: 1}
  two: {uses: train, dataset: captions, steps: 1}
"""


@pytest.fixture
def load(pipeline):
    from tests.flows.conftest import PREPARE

    def read(line):
        return load_spec(pipeline(PREPARE + UPSTREAM + f"  both: {{uses: merge, adapters: [one, two]{line}}}\n"))

    return read


def merge_of(spec):
    return spec.steps["both"]


def key_of(spec):
    return prepare_job("both", merge_of(spec), spec.folder).key({})


def test_the_old_spelling_stays_valid_and_concatenates(load):
    merge = merge_of(load(", weights: [1.0, 0.8]"))
    assert (merge.method, merge.options.name, merge.weights) == ("concatenate", "concatenate", (1.0, 0.8))
    assert (merge.base, merge.seed) == ("tiny", 7)


@pytest.mark.parametrize(
    "line", [", method: ties, density: 0.3, rank: 4", ", method: ties, options: {density: 0.3, rank: 4}"]
)
def test_options_are_set_beside_the_method_or_under_options(load, line):
    merge = merge_of(load(line))
    assert (merge.options.name, merge.options.density, merge.options.rank, merge.options.scale) == ("ties", 0.3, 4, 1.0)


def test_weights_may_be_by_pattern(load):
    merge = merge_of(load(", weights: [{unet.down: 0.5, '*': 1}, 0.8]"))
    assert merge.weights == ({"unet.down": 0.5, "*": 1.0}, 0.8)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (", method: tie", "'concatenate'"),
        (", method: ties, window: 0.5", "unknown key 'both.window'"),
        (", method: ties, density: 0", "density is 0"),
        (", method: ties, density: '0.5'", "density is '0.5'"),
        (", method: svd", "svd needs rank, energy or error"),
        (", method: della, density: 0.1, window: 0.5", "probabilities from"),
        (", method: ties, density: 0.5, options: {density: 0.5}", "is set both beside"),
        (", method: ties, options: {method: dare}", "options are for method 'dare'"),
        (", weights: [1.0]", "1 weights for 2 adapters"),
        (", method: learned", "'learned' needs a dataset"),
        (", dataset: captions", "takes no dataset"),
    ],
)
def test_invalid_merges_are_refused_before_anything_runs(load, line, problem):
    with pytest.raises(SpecError, match=problem):
        load(line)


def test_learned_takes_a_dataset_step(load):
    merge = merge_of(load(", method: learned, dataset: captions, per: block"))
    assert ("dataset", "captions", "manifest") in list(merge.references())
    assert merge.options.per == "block"


def test_the_cache_key_holds_method_parameters_weights_and_seed(load):
    lines = [
        ", method: dare",
        ", method: dare, density: 0.6",
        ", method: dare, seed: 8",
        ", method: dare, weights: [1.0, 0.8]",
        ", method: dare-ties",
    ]
    assert len({key_of(load(line)) for line in lines}) == len(lines)
    assert key_of(load(", method: dare, density: 0.6")) == key_of(load(", method: dare, options: {density: 0.6}"))


def test_a_step_survives_serialization_to_another_process(load):
    merge = merge_of(load(", method: della, density: 0.6, weights: [{unet: 0.5}, 0.8]"))
    assert type(merge).model_validate(merge.model_dump(mode="json")) == merge
