"""Targets that parse a text of the command line, of a prompt or of a caption, as the verbs get it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from flows.spec import load_spec
from flows.web.a1111_infotext import fill_unset
from lora_engine.adapters.select import select_modules
from lora_engine.data.spec import CaptionSettings
from lora_engine.data.text_files import clean_text, printable
from lora_engine.data.trigger import render_template
from lora_engine.errors import SettingsError, WordedError
from lora_engine.files import atomic_write, is_file_name, write_within
from lora_engine.inference.prompts.prompt import chunks_of, parse_prompt
from lora_engine.inference.regions import parse_region
from lora_engine.merging.methods import parse_options
from lora_engine.merging.weights import weights_by_module
from registry.policy.licenses import read_licenses
from registry.refs import can_exist, check_alias, check_name, split_ref, version_number
from tasks.condition import parse_condition
from tasks.operations.adapter_files import parse_settings, parse_weighted
from tests.fuzz.files import Files, as_text, text_of, write_files
from tests.fuzz.target import Target
from tests.laws.law_adapters import SDXL_NAMES

_LINE = b"name: a\nsteps:\n  adapter: {uses: merge, adapters: ['x@1', 'y@1'], method: ties, density: 0.3}\n"
_SYNTAX = set("()[]\\: \t\n")


def _texts(*texts: str) -> Callable[[Path], list[Files]]:
    return lambda _: [as_text(text) for text in texts]


def _on_text(check: Callable[[str, Path], object]) -> Callable[[Path, Path], object]:
    """Returns a check that gets the text of an input."""

    def read(folder: Path, output: Path) -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        check(text_of(files).replace("\0", ""), output)  # an argument of a process has no zero byte

    return read


def _accepts(check: Callable[[str], object], text: str) -> bool:
    try:
        check(text)
    except WordedError:
        return False
    return True


def check_ref(text: str, output: Path) -> None:
    """Parses a reference; what can exist has the parts of a name and of a number or an alias."""
    name, ref = split_ref(text)
    number = version_number(ref)
    assert number is None or 0 < number < 10**18
    if can_exist(name, ref):
        assert is_file_name(name)
        assert _accepts(check_name, name)
    if name and _accepts(check_alias, ref):
        assert can_exist("zorb", ref)
    weighted, weight = parse_weighted(text)
    assert isinstance(weighted, str)
    assert isinstance(weight, float)
    if not can_exist(name, ref):
        check_name(text)
        assert is_file_name(text)


def check_file_name(text: str, output: Path) -> None:
    """Writes a file of that name; the writer refuses names that leave the folder."""
    if not is_file_name(text):
        raise SettingsError(f"{printable(text)[:200]!r} is no name of a file")
    with write_within(output):
        atomic_write(output / text, b"x")
    assert (output / text).read_bytes() == b"x"


def check_setting(text: str, output: Path) -> None:
    """Parses `key=value` as `--set` of a pipeline and of a merge do."""
    write_files(output, {"line.yaml": _LINE})
    if _accepts(lambda value: load_spec(output / "line.yaml", [value]), text):
        assert "=" in text
        return
    parse_options("ties", parse_settings([text]))


def check_prompt(text: str, output: Path) -> None:
    """Reads a prompt; the texts of all steps have only its characters in their order, and each weight is finite."""
    prompt = parse_prompt(text)
    for tag in prompt.adapters:
        assert tag.name
        assert all(math.isfinite(tag.denoiser_weight(step, 7)) for step in range(7))
    for part in prompt.parts:
        for _, shown in part.by_step(7):
            pieces = [pair for chunk in chunks_of(shown) for pair in chunk]
            assert all(math.isfinite(weight) for _, weight in pieces)
            words = [character for character in "".join(piece for piece, _ in pieces) if character not in _SYNTAX]
            rest = iter(text)
            assert all(any(character == other for other in rest) for character in words), "characters not in the prompt"


def check_caption(text: str, output: Path) -> None:
    """Cleans a caption and a template; cleaning twice changes nothing more."""
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert printable(text).isprintable()
    try:
        settings = CaptionSettings(template=text, trigger="zorb", class_word="ring")
    except ValueError as error:
        raise SettingsError(str(error).splitlines()[0]) from None
    assert clean_text(render_template(settings)) == render_template(settings)


def check_pattern(text: str, output: Path) -> None:
    """Matches a pattern of targets, and one of merge weights, with the names of modules."""
    if _accepts(lambda pattern: weights_by_module({pattern: 0.5}, list(SDXL_NAMES)), text):
        return
    chosen = select_modules(SDXL_NAMES, text)
    assert chosen
    assert set(chosen) <= set(SDXL_NAMES)


def check_license(text: str, output: Path) -> None:
    """Evaluates an SPDX expression; unknown parts make it unknown, which allows nothing."""
    terms = read_licenses().terms_of_license(text, "a base")
    assert terms.expression
    if terms.unknown:
        assert not terms.permissions
        raise SettingsError(f"no license is known for {sorted(terms.unknown)[0]}")


def check_condition(text: str, output: Path) -> None:
    """Parses a condition of a step; its bound is finite."""
    try:
        condition = parse_condition(text)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    assert math.isfinite(condition.bound)
    assert condition.text == text


def check_region(text: str, output: Path) -> None:
    """Parses a region of an image; it has a box inside the image, or the name of a mask."""
    region = parse_region(text)
    if region.mask is None:
        assert region.box is not None
        left, top, right, bottom = region.box
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1


def check_infotext(text: str, output: Path) -> None:
    """Fills a request with the settings of an infotext."""
    assert isinstance(fill_unset({}, text), dict)


_PROMPTS = (
    *("a (red:1.3) zorb, [small] <lora:zorb@production:0.7>", "((a)) \\(b\\) [c:0.5] <lora:a.safetensors>"),
    *("a" * 50 + " (b (c (d:2) e):0.1)", "<lora:x:1e3><lora:y:-.5> \u00e9"),
)
_REFS = ("zorb@1", "zorb@production", "a.b-c_d@latest", "zorb", "x" * 63 + "@" + "9" * 18)
_SETS = (
    "adapter.density=0.5",
    "density=0.3",
    "name=b",
    "adapter.adapters=[x@1, y@2]",
    "steps.adapter.rank=8",
    "seed=3",
)
_PATTERNS = (
    "attention",
    "unet.*.to_q",
    "re:unet\\..*\\.to_[qkv]",
    "unet.down_blocks.[0-1]*",
    "IN04",
    "text_encoder",
    "*",
)
_CONDITIONS = ("report.gates passed", "report.gates failed", "report.clip_t >= 0.2", "report.clip_t.difference <= -0.1")
_REGIONS = ('0,0,0.5,1="a red zorb"', "mask.png=a (zorb:1.2) <lora:x:1>", ".5,0,1,1=b")
_INFOTEXTS = (
    "a ring\nNegative prompt: b\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 512x512, Clip skip: 2",
    'a\nSteps: 3, Lora hashes: "a: 0123, b: 45", Hires upscale: 2',
)
_LICENSES = ("MIT", "MIT OR (Apache-2.0 AND CC-BY-4.0)", "GPL-2.0-only WITH Classpath-exception-2.0", "openrail++")

TEXTS = (
    Target("refs", _texts(*_REFS), _on_text(check_ref)),
    Target("file-names", _texts("zorb.safetensors", "a b", "\u00e9", "x" * 255), _on_text(check_file_name)),
    Target("set", _texts(*_SETS), _on_text(check_setting)),
    Target("prompts", _texts(*_PROMPTS), _on_text(check_prompt), 2.0),
    Target("captions", _texts("a {trigger} {class_word}", "a \u0301 zorb {trigger}"), _on_text(check_caption)),
    Target("patterns", _texts(*_PATTERNS), _on_text(check_pattern)),
    Target("conditions", _texts(*_CONDITIONS), _on_text(check_condition), 0.5),
    Target("regions", _texts(*_REGIONS), _on_text(check_region)),
    Target("infotexts", _texts(*_INFOTEXTS), _on_text(check_infotext)),
    Target("expressions", _texts(*_LICENSES), _on_text(check_license)),
)
"""Targets of texts."""
