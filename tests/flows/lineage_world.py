"""Makes random graphs of versions with pipelines and verbs, beside the independent model of their rights."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from random import Random

from safetensors.torch import load_file, save_file

from flows.spec import load_spec
from lora_engine.catalog.formats import written_formats
from lora_engine.formats import read_bundle, write_adapter
from lora_engine.formats.card import Card
from lora_engine.formats.safetensors_io import read_header
from registry.entities import Execution, Subject, now
from registry.home import Home
from registry.policy.license_terms import combine
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here
from tests.flows.lineage_model import TABLE, LineageModel, Node, digest_of, weights_of
from tests.flows.made import random_adapter, run_steps

LICENSES = ("MIT", "CC-BY-4.0", "CC-BY-NC-4.0", "Apache-2.0")
POLICY = "aliases: {shop: {needs_licence: commercial, needs_consent: known}}\n"
IMAGE = {"width": 4, "height": 4, "caption": "", "file": "pictures/0000000000000000.png", "source": "a.png"}
PIPELINE = """\
name: {name}
base: tiny
steps:
  mix: {{uses: merge, adapters: [{refs}], weights: {weights}}}
  release: {{uses: register, adapter: mix}}
  exports: {{uses: convert, adapter: mix, to: [{form}]}}
"""


class World(LineageModel):
    """A home, files that left it, and the model of both."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        self.random, self.folder, self.seed = Random(seed), folder, seed
        self.home = Home.open(folder / "home")
        (self.home.path / "policy.yaml").write_text(POLICY)
        self.files: list[Path] = []
        self.forms: set[str] = set()
        self.refused = 0

    def grow(self, count: int) -> None:
        """Does random things until there are that many versions."""
        self.train()
        self.bring_from_outside()
        actions = [self.train, self.bring_from_outside, self.merge_in_a_pipeline, self.export, self.export, self.strip]
        actions += [self.convert, self.resize, self.merge_files, self.import_a_file, self.import_a_file]
        while len(self.versions()) < count:
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
        """Runs a pipeline that merges versions, registers the result and writes it in some format."""
        chosen, form = self._some_versions(2), self._form()
        name = f"n{len(self.nodes)}"
        path = self.folder / f"{name}.yaml"
        refs = ", ".join(node.name for node in chosen)
        path.write_text(PIPELINE.format(name=name, refs=refs, weights=[1.0, 0.5][: len(chosen)], form=form))
        outputs = run_steps(load_spec(path), self.home)
        with closing(Versions(self.home)) as versions:
            version = versions.show(name, 1)
            merged, out = self._next("merged.safetensors"), self._next("pipeline")
            versions.store.checkout_file(version.artifact, version.adapter_path, merged)
            versions.store.checkout(outputs["exports"], out)
        parents = {node.name for node in chosen}
        self._add_version(Node(version.ref, parents, weights=weights_of(merged), digest=version.sha256))
        folder = out / form
        files = [folder] if form == "peft" else list(folder.glob("*.safetensors"))
        self._add_file(*files, {version.ref})
        self._check_license(*files, version.ref)

    def export(self) -> None:
        """Exports a version in some format."""
        (node,) = self._some_versions(1)
        out = self._next("export")
        more = ["--dtype", "float16"] if self.random.random() < 0.3 else []
        self._verb(out, {node.name}, "export", node.name, "--to", self._form(), "--base", "tiny", *more)
        self._check_license(self.files[-1], node.name)

    def convert(self) -> None:
        """Converts a version or a file."""
        text, sources = self._some_input()
        self._verb(self._next("convert"), sources, "convert", text, "--to", self._form(), "--base", "tiny")
        if text in self.nodes:
            self._check_license(self.files[-1], text)

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
            if weights_of(out) == weights_of(source):  # a format may keep its alphas in the header
                self.files.append(out)

    def import_a_file(self) -> None:
        """Imports a file under some license, which may be looser than it should."""
        if self.files:
            path = self.random.choice(self.files)
            self._import(path, self.random.choice(LICENSES), override=self.random.random() < 0.3)

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
        form = self.random.choice(sorted(written_formats()))
        self.forms.add(form)
        return form

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
        self._add_file(out, sources)

    def _add_file(self, path: Path, sources: set[str]) -> None:
        name = path.relative_to(self.folder).as_posix()
        self.nodes[name] = Node(name, sources, weights=weights_of(path), digest=digest_of(path), is_file=True)
        self.files.append(path)

    def _check_license(self, path: Path, source: str) -> None:
        """Asserts that a file states the licenses of everything that its source was made from."""
        header = read_header(path / "adapter_model.safetensors" if path.is_dir() else path)[1]
        assert header["modelspec.license"] == self.terms_of({source}).expression, (path, source)

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
        self._add_version(Node(version.ref, parents, license_id, weights=weights_of(path), digest=version.sha256))

    def _register(self, versions: Versions, adapter: object, path: Path, parents: set[str], **facts: object) -> None:
        license_id = self.random.choice(LICENSES)
        version = versions.register(f"n{len(self.nodes)}", adapter, card={"license": license_id, "base": "tiny"})  # type: ignore[arg-type]
        node = Node(version.ref, parents, license_id, weights=weights_of(path), digest=version.sha256)
        self._add_version(Node(**{**vars(node), **facts}))

    def _add_version(self, node: Node) -> None:
        for other in self.versions():
            if other.digest == node.digest:  # versions of the same bytes are one node
                other.parents.add(node.name)
                node.parents.add(other.name)
        self.nodes[node.name] = node
