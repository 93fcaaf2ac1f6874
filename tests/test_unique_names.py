"""One name, one thing: few public names are defined at module level in more than one product file."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lora_engine", "registry", "tasks", "flows")
LIMIT = 15
PROTOCOLS = {
    "main": "entry point of a module that is run as a process",
    "find_imports": "the heavy modules that a step imports",
    "revision": "name of a database migration",
    "down_revision": "name of the migration before",
    "upgrade": "applies a database migration",
}
"""Names that are one protocol with an implementation per file."""


def defined_names(path: Path) -> Iterator[str]:
    """Yields the public names that a file defines at module level, without verbs of the command line and steps."""
    is_cli = path.is_relative_to(ROOT / "flows" / "cli")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_step = any(ast.unparse(decorator).startswith("step(") for decorator in node.decorator_list)
            names = [] if is_cli or is_step else [node.name]
        elif isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def files_by_name(root: Path = ROOT) -> dict[str, list[str]]:
    files: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        for name in set(defined_names(path)):
            files[name].append(str(path.relative_to(root)))
    return {name: paths for name, paths in files.items() if len(paths) > 1}


def test_fewer_than_fifteen_public_names_are_defined_in_several_files() -> None:
    files = files_by_name()
    assert PROTOCOLS.keys() <= files.keys(), "a protocol with one implementation needs no exception"
    repeated = {name: paths for name, paths in sorted(files.items()) if name not in PROTOCOLS}
    assert len(repeated) < LIMIT, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in repeated.items())


def test_classes_functions_and_constants_count_and_private_names_and_steps_do_not(tmp_path: Path) -> None:
    text = "class A: ...\ndef b(): ...\nC = 1\nD: int = 2\n_e = 3\n@step(A, produces='x')\ndef f(): ...\n"
    for package in ("registry", "tasks"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "module.py").write_text(text)
    assert sorted(files_by_name(tmp_path)) == ["A", "C", "D", "b"]
