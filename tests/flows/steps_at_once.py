"""Runs `loraline` and reports modules of heavy libraries that the threads of steps import without the lock.

`python -m tests.flows.steps_at_once REPORT ARGUMENTS...` writes one name per line to the file REPORT. It detects the
cause of import races deterministically.
"""

from __future__ import annotations

import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path

HEAVY = {"accelerate", "diffusers", "huggingface_hub", "lora_engine", "numpy", "safetensors", "torch", "transformers"}


class Watch:
    """A module finder that finds nothing, and records the imports of other threads than the main thread."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] in HEAVY and threading.current_thread() is not threading.main_thread():
            lock = getattr(sys.modules.get("lora_engine.building"), "BUILDING", None)
            if lock is None or not lock._is_owned():
                self.seen.append(f"{name} in {threading.current_thread().name}")
        return None


def main() -> None:
    report, arguments = Path(sys.argv[1]), sys.argv[2:]
    watch = Watch()
    sys.meta_path.insert(0, watch)
    from flows.cli import start as loraline

    sys.argv = ["loraline", *arguments]
    try:
        loraline()
    finally:
        report.write_text("".join(f"{line}\n" for line in watch.seen))


if __name__ == "__main__":
    main()
