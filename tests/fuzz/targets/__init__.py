"""The fuzzed targets by name; a new reader is fuzzed by an entry in the list of its module."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fuzz.target import Target
from tests.fuzz.targets.data import DATA
from tests.fuzz.targets.homes import HOMES
from tests.fuzz.targets.pickled import PICKLED
from tests.fuzz.targets.received import RECEIVED
from tests.fuzz.targets.settings import SETTINGS
from tests.fuzz.targets.texts import TEXTS
from tests.fuzz.targets.weights import WEIGHTS

TARGETS: Mapping[str, Target] = {
    target.name: target for target in (*WEIGHTS, *PICKLED, *DATA, *SETTINGS, *RECEIVED, *TEXTS, *HOMES)
}
"""Name -> target."""
