"""Makes random graphs of versions with pipelines and verbs, and predicts their rights with an independent model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from safetensors.torch import load_file, save_file

from lora_engine.adapters import LoraDelta
from lora_engine.catalog.formats import written_formats
from lora_engine.files import sha256_file
from lora_engine.formats import Bundle, read_bundle, write_adapter
from lora_engine.formats.card import Card
from lora_engine.merging.files import merge_files
from registry.entities import Execution, Subject, now
from registry.home import Home
from registry.policy.license_terms import LicenseTerms, combine
from registry.policy.licenses import read_licenses
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here
from tests.flows.made import random_adapter

LICENSES = ("MIT", "CC-BY-4.0", "CC-BY-NC-4.0", "Apache-2.0")
POLICY = "aliases: {shop: {needs_licence: commercial, needs_consent: known}}\n"
TABLE = read_licenses()
IMAGE = {"width": 4, "height": 4, "caption": "", "file": "pictures/0000000000000000.png", "source": "a.png"}
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


class World:
    """A home, files that left it, and the model of both."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random, self.folder, self.seed = Random(seed), folder, seed
        self.home = Home.open(folder / "home")
        (self.home.path / "policy.yaml").write_text(POLICY)
        self.nodes: dict[str, Node] = {}
        self.files: list[Path] = []
        self.revoked: set[str] = set()
        self.refused = 0

    def grow(self, steps: int) -> None:
        """Does random things; the first two make versions."""
        self.train()
        self.bring_from_outside()
        actions = [self.train, self.bring_from_outside, self.merge_in_a_pipeline, self.export, self.export, self.strip]
        actions += [self.convert, self.resize, self.merge_files, self.import_a_file, self.import_a_file]
        for _ in range(steps):
            self.random.choice(actions)()

    # What happens

    def train(self) -> None:
        """Registers an adapter that was trained on one image with a consent."""
        number = len(self.nodes)
        image, consent = f"{number:064x}", f"C-{self.random.randrange(4)}"
        expired = self.random.random() < 0.2
        path = self._write(number)
        rights = {"license": "CC-BY-4.0", "expires": "2020-01-01" if expired else "2999-01-01"}
        entry = IMAGE | {"sha256": image, "consent": consent, "rights": rights}
        with closing(Versions(self.home)) as versions:
            store = versions.store
            dataset = store.put_files("manifest", {"manifest.json": json.dumps({"pictures": [entry]}).encode()})
            run = versions.lineage.start_run("train", {})
            subjects = [Subject(image, "picture", "p"), Subject(consent, "consent", "c")]
            ingest = Execution(
                f"{run.id}-i", run.id, "i", "ingest", "1", run.id + "i", output=dataset, started_at=now()
            )
            versions.lineage.log_execution(ingest, contents=store.files(dataset), subjects=subjects)
            adapter = store.put_files("adapter", {"adapter.safetensors": path.read_bytes()})
            settings = {"settings": {"base": "tiny"}}
            step = Execution(run.id, run.id, "t", "train", "1", run.id, settings, {"dataset": dataset}, adapter)
            versions.lineage.log_execution(step, contents=store.files(adapter))
            self._register(versions, adapter, path, set(), image=image, consent=consent, expired=expired)

    def bring_from_outside(self) -> None:
        """Imports a file that nothing is known about, and keeps it."""
        path = self._write(len(self.nodes))
        self.files.append(path)
        self._import(path, self.random.choice(LICENSES), override=False)

    def merge_in_a_pipeline(self) -> None:
        """Registers a merge of two versions by a recorded step."""
        chosen = self._some_versions(2)
        out = self.folder / f"{len(self.nodes)}-pipeline.safetensors"
        with closing(Versions(self.home)) as versions:
            found = [versions.show(*node.name.split("@")) for node in chosen]
            parts = [self.folder / f"part{index}.safetensors" for index in range(len(found))]
            for version, part in zip(found, parts, strict=True):
                versions.store.checkout_file(version.artifact, version.adapter_path, part)
            merge_files(parts, [1.0, 0.5][: len(parts)], out)
            adapter = versions.store.put_files("adapter", {"adapter.safetensors": out.read_bytes()})
            run = versions.lineage.start_run("merge", {})
            inputs = {f"adapters.{index}": version.artifact for index, version in enumerate(found)}
            step = Execution(run.id, run.id, "m", "merge", "1", run.id, {}, inputs, adapter, started_at=now())
            versions.lineage.log_execution(step, contents=versions.store.files(adapter))
            self._register(versions, adapter, out, {node.name for node in chosen})

    def export(self) -> None:
        """Exports a version in some format."""
        (node,) = self._some_versions(1)
        out = self._next("export")
        more = ["--dtype", "float16"] if self.random.random() < 0.3 else []
        self._verb(out, {node.name}, "export", node.name, "--to", self._form(), "--base", "tiny", *more)

    def convert(self) -> None:
        """Converts a version or a file."""
        text, sources = self._some_input()
        self._verb(self._next("convert"), sources, "convert", text, "--to", self._form(), "--base", "tiny")

    def resize(self) -> None:
        """Resizes a version or a file to rank 1."""
        text, sources = self._some_input()
        self._verb(self._next("resize"), sources, "resize", text, "--rank", "1", "--base", "tiny")

    def merge_files(self) -> None:
        """Merges two of versions and files."""
        first, second = self._some_input(), self._some_input()
        self._verb(self._next("merge"), first[1] | second[1], "merge", first[0], f"{second[0]}:0.5")

    def strip(self) -> None:
        """Saves a file again without its header, which names nothing any more."""
        candidates = [path for path in self.files if path.is_file()]
        if candidates:
            source = self.random.choice(candidates)
            out = self._next("stripped").with_suffix(".safetensors")
            header = {"format": "pt"}
            save_file(load_file(source), out, header)
            if _weights(out) == _weights(source):  # a format may keep its alphas in the header
                self.files.append(out)

    def import_a_file(self) -> None:
        """Imports a file under some license, which may be looser than it should."""
        if self.files:
            path = self.random.choice(self.files)
            self._import(path, self.random.choice(LICENSES), override=self.random.random() < 0.3)

    # The model

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
        by_bytes = {node.name for node in self.nodes.values() if node.digest == _digest(path)}
        if by_bytes:
            return by_bytes
        weights = _weights(path)
        equal = {node.name for node in self.nodes.values() if node.weights == weights}
        # A file that was made from nothing but files and versions of the same weights says nothing of its own.
        return {name for name in equal if not self.nodes[name].is_file or not self.nodes[name].parents <= equal}

    def _statements(self, node: Node) -> Iterator[LicenseTerms]:
        if not node.is_file:
            yield TABLE.terms_of_base("tiny")
            yield TABLE.terms_of_license(node.license, "it")
        if node.image:
            yield TABLE.terms_of_license("CC-BY-4.0", "it")

    # Parts

    def _write(self, number: int) -> Path:
        path = self.folder / f"{number}.safetensors"
        write_adapter(path, random_adapter(1000 * self.seed + number, modules=2), format="kohya")
        if number % 2:
            write_adapter(path, read_bundle(path).adapter, card=Card(title=f"t{number}"))
        return path

    def _next(self, verb: str) -> Path:
        return self.folder / f"{len(self.nodes)}-{len(self.files)}-{self.random.randrange(10**9)}-{verb}"

    def _form(self) -> str:
        return self.random.choice(sorted(written_formats()))

    def _some_versions(self, count: int) -> list[Node]:
        active = self.versions()
        return self.random.sample(active, min(count, len(active)))

    def _some_input(self) -> tuple[str, set[str]]:
        if self.files and self.random.random() < 0.5:
            path = self.random.choice(self.files)
            return str(path), self.found_for(path)
        (node,) = self._some_versions(1)
        return node.name, {node.name}

    def _verb(self, out: Path, sources: set[str], *arguments: object) -> None:
        is_export = arguments[0] in ("export", "convert")
        form = arguments[arguments.index("--to") + 1] if is_export else ""
        out = out if form == "peft" else out.with_suffix(".safetensors")
        done = loraline_here(*arguments, "-o", out, home=self.home.path)
        assert done.returncode == 0, done.stderr
        node = Node(out.name, sources, weights=_weights(out), digest=_digest(out), is_file=True)
        self.nodes[node.name] = node
        self.files.append(out)

    def _import(self, path: Path, license_id: str, *, override: bool) -> None:
        parents, name = self.found_for(path), f"n{len(self.nodes)}"
        parents -= {node.name for node in self.nodes.values() if node.name == name}
        inherited = self.terms_of(parents)
        stated = combine(TABLE.terms_of_base("tiny"), TABLE.terms_of_license(license_id, "it"))
        both = combine(stated, inherited)
        is_looser = any(
            getattr(both, part) != getattr(stated, part) for part in ("permissions", "obligations", "restrictions")
        )
        is_revoked = any(self.ancestors(parent) & self.revoked for parent in parents)
        more = ["--override", "--reason", "a contract"] if override else []
        options = ["--name", name, "--base", "tiny", "--license", license_id, *more]
        done = loraline_here("import", path, *options, home=self.home.path)
        assert (done.returncode == 0) == (not is_revoked and (override or not is_looser)), (done.stderr, parents)
        if done.returncode:
            self.refused += 1
            return
        with closing(Versions(self.home)) as versions:
            version = versions.show(name, 1)
        self._add_version(Node(version.ref, parents, license_id, weights=_weights(path), digest=version.sha256))

    def _register(self, versions: Versions, adapter: object, path: Path, parents: set[str], **facts: object) -> None:
        license_id = self.random.choice(LICENSES)
        version = versions.register(f"n{len(self.nodes)}", adapter, card={"license": license_id, "base": "tiny"})  # type: ignore[arg-type]
        node = Node(version.ref, parents, license_id, weights=_weights(path), digest=version.sha256)
        self._add_version(Node(**{**vars(node), **facts}))

    def _add_version(self, node: Node) -> None:
        for other in self.versions():
            if other.digest == node.digest:  # versions of the same bytes are one node
                other.parents.add(node.name)
                node.parents.add(other.name)
        self.nodes[node.name] = node


def _weights(path: Path) -> Weights:
    """Returns the factors of each module of a LoRA, with its scale in `up`."""
    from lora_engine.bases.structure import base_module_shapes

    bundle: Bundle = read_bundle(path, base_module_shapes("tiny"))
    weights: Weights = {}
    for name, delta in bundle.adapter.modules.items():
        assert isinstance(delta, LoraDelta)
        up = delta.up if delta.alpha == delta.rank else delta.up * (delta.alpha / delta.rank)
        weights[name] = (up.flatten(1).float().numpy().tobytes(), delta.down.flatten(1).float().numpy().tobytes())
    return weights


def _digest(path: Path) -> str:
    return sha256_file(path / "adapter_model.safetensors" if path.is_dir() else path)
