"""The independent model of rights, recalls and promotions, which random graphs are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_engine.adapters import LoraDelta
from lora_engine.files import sha256_file
from lora_engine.formats import Bundle, read_bundle
from registry.policy.license_terms import LicenseTerms, combine
from registry.policy.licenses import read_licenses

TABLE = read_licenses()
Weights = dict[str, tuple[bytes, bytes]]


@dataclass
class Node:
    """A version, or a file outside of the store, with what it was truly made from."""

    name: str
    parents: set[str] = field(default_factory=set)
    license: str = ""
    image: str = ""
    consent: str = ""
    expired: bool = False
    weights: Weights = field(default_factory=dict)
    digest: str = ""
    is_file: bool = False


class LineageModel:
    """All versions and files with what they were truly made from.

    Attributes:
        nodes: Name -> node.
        revoked: Names of the revoked nodes.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.revoked: set[str] = set()

    def ancestors(self, name: str) -> set[str]:
        """Returns a node and everything that it was truly made from."""
        found, waiting = set[str](), [name]
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                waiting += self.nodes[current].parents
        return found

    def versions(self) -> list[Node]:
        """Returns the versions."""
        return [node for node in self.nodes.values() if not node.is_file]

    def terms_of(self, names: set[str]) -> LicenseTerms:
        """Returns the meet of the statements of nodes and of everything that they were made from."""
        closure = set[str]().union(*(self.ancestors(name) for name in names))
        return combine(*(terms for name in closure for terms in self._statements(self.nodes[name])))

    def affected_by(self, subjects: set[str]) -> set[str]:
        """Returns the versions that are, or were made from, one of the nodes."""
        return {node.name for node in self.versions() if self.ancestors(node.name) & subjects}

    def may_be_sold(self, name: str) -> bool:
        """Returns True if the policy of `shop` allows the version."""
        closure = self.ancestors(name)
        is_expired = any(self.nodes[entry].expired for entry in closure)
        return "commercial" in self.terms_of({name}).permissions and not is_expired and not closure & self.revoked

    def found_for(self, path: Path) -> set[str]:
        """Returns the nodes that the registry may know of a file: those of its bytes, else those of its weights."""
        by_bytes = {node.name for node in self.nodes.values() if node.digest == digest_of(path)}
        if by_bytes:
            return by_bytes
        weights = weights_of(path)
        equal = {node.name for node in self.nodes.values() if node.weights == weights}
        # A file that was made from nothing but files and versions of the same weights says nothing of its own.
        return {name for name in equal if not self.nodes[name].is_file or not self.nodes[name].parents <= equal}

    def _statements(self, node: Node) -> Iterator[LicenseTerms]:
        if not node.is_file:
            yield TABLE.terms_of_base("tiny")
        if node.license:
            yield TABLE.terms_of_license(node.license, "it")
        if node.image:
            yield TABLE.terms_of_license("CC-BY-4.0", "it")


def weights_of(path: Path) -> Weights:
    """Returns the factors of each module of a LoRA, with its scale in `up`."""
    from lora_engine.bases.structure import base_module_shapes

    bundle: Bundle = read_bundle(path, base_module_shapes("tiny"))
    weights: Weights = {}
    for name, delta in bundle.adapter.modules.items():
        assert isinstance(delta, LoraDelta)
        up = delta.up if delta.alpha == delta.rank else delta.up * (delta.alpha / delta.rank)
        weights[name] = (up.flatten(1).float().numpy().tobytes(), delta.down.flatten(1).float().numpy().tobytes())
    return weights


def digest_of(path: Path) -> str:
    return sha256_file(path / "adapter_model.safetensors" if path.is_dir() else path)
