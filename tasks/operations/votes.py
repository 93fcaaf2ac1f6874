"""Prepares comparisons for blind votes: the same prompts and seeds drawn by a version and by another one."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_engine.errors import SettingsError
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.inference.prompts.prompt import parse_prompt
from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import UnknownVersion, VoteError
from registry.home import Home
from registry.policy.votes import BASE, KIND
from registry.store.artifacts import Store
from registry.versions.guard import require_permission
from registry.versions.versions import Versions
from registry.versions.voting import MAX_PAIRS, log_comparison
from tasks.operations.draw_request import DrawRequest
from tasks.operations.promote import find_version
from tasks.operations.verb_run import describe_verb, verb_run

ComparedSide = Literal["candidate", "against"]
SIDES: tuple[ComparedSide, ComparedSide] = ("candidate", "against")
DrawEach = Callable[[Sequence[DrawRequest]], Iterable[Sequence[bytes]]]
"""Draws requests in their order; yields the images of each as PNG files."""
_INDEX = "comparison.json"
_MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class ComparisonRequest:
    """What to compare.

    Attributes:
        prompts: Prompts without adapters, in A1111's syntax.
        count: Number of seeds per prompt.
        seed: The first seed.
        base: The base model.
        weight: Weight of each version's adapter.
        negative: The negative prompt.
        steps: Number of denoising steps.
        guidance: Scale of classifier-free guidance.
        size: (height, width) in pixels; None means the base's own.
        sampler: See `DrawRequest`.
    """

    prompts: tuple[str, ...]
    count: int = 1
    seed: int = 0
    base: str = "tiny"
    weight: float = 1.0
    negative: str = ""
    steps: int = 20
    guidance: float = 3.0
    size: tuple[int, int] | None = None
    sampler: str | None = None


class PairEntry(BaseModel):
    """A pair of images: what both were drawn from, and their files in the artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    candidate: str
    against: str


class ComparisonIndex(BaseModel):
    """The content of `comparison.json`.

    Attributes:
        candidate: `name@version` of the version.
        against: `name@version` of the other one, or `base`.
        salt: Random text that the order and the sides of every voter follow from. Readers of the store know it.
        settings: Settings that both versions were drawn with.
        pairs: The pairs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: str
    against: str
    salt: Annotated[str, Field(min_length=32)]
    settings: Mapping[str, object]
    pairs: tuple[PairEntry, ...]


def prepare_comparison(
    home: Home, ref: str, against: str, request: ComparisonRequest, draw_each: DrawEach, *, actor: str | None = None
) -> tuple[ArtifactRef, ComparisonIndex]:
    """Draws a comparison, stores it as made from both versions, and records it in the log.

    Pairs whose images are equal are left out.

    Args:
        home: The home with all state.
        ref: `name@version` or `name@alias` of the version.
        against: An alias of the same adapter, `name@version`, `name@alias`, or `base` for no adapter.
        request: What to compare.
        draw_each: Draws the images.
        actor: The user; None means this process's user.

    Raises:
        Refused: The user has no role that may vote, or something upstream of a version was revoked.
        GoneVersion: A version was withdrawn or deleted.
        SettingsError: A prompt or a setting cannot be used.
        VoteError: The versions are the same, or draw the same images.
    """
    with closing(Versions(home)) as versions:
        candidate, other = _resolve(versions, ref, against)
        require_permission(versions, "compare", name=candidate.name, actor=actor)
        requests = _requests(request, candidate, other)
        sides = list(zip(draw_each(requests), requests, strict=True))
        files: dict[str, bytes] = {}
        pairs: list[PairEntry] = []
        for number, prompt in enumerate(request.prompts):
            (first, drawn), (second, _) = sides[2 * number], sides[2 * number + 1]
            for offset, images in enumerate(zip(map(_plain, first), map(_plain, second), strict=True)):
                if images[0] == images[1]:
                    continue
                names = [f"pairs/{len(pairs):04d}-{side}.png" for side in SIDES]
                files |= dict(zip(names, images, strict=True))
                entry = PairEntry(prompt=prompt, seed=drawn.seed + offset, candidate=names[0], against=names[1])
                pairs.append(entry)
        opponent = other.ref if other is not None else BASE
        if not pairs:
            raise VoteError(f"{opponent} draws the same images", where=candidate.ref, remedy="compare other versions")
        settings = {name: getattr(request, name) for name in ("base", "weight", "negative", "steps", "guidance")}
        index = ComparisonIndex(
            candidate=candidate.ref,
            against=opponent,
            salt=secrets.token_hex(32),
            settings={**settings, "size": request.size, "sampler": request.sampler},
            pairs=tuple(pairs),
        )
        files[_INDEX] = canonical_json(index.model_dump(mode="json"))
        artifact = _store(versions, candidate, other, files, index)
        prompts = [sha256_bytes(entry.prompt.encode())[:32] for entry in pairs]
        log_comparison(
            versions,
            candidate.name,
            candidate.version,
            against=opponent,
            artifact=artifact,
            prompts=prompts,
            actor=actor,
        )
        return artifact, index


def read_index(store: Store, artifact: ArtifactRef) -> ComparisonIndex:
    """Returns what a comparison has; its bytes are verified.

    Raises:
        StoreError: It is missing or damaged.
        VoteError: It is no comparison.
    """
    try:
        return ComparisonIndex.model_validate_json(store.read(artifact, _INDEX))
    except ValidationError as error:
        problem = error.errors()[0]
        raise VoteError(f"it is no comparison: {problem['msg']}", where=f"artifact {artifact.sha256[:12]}") from None


def _resolve(versions: Versions, ref: str, against: str) -> tuple[AdapterVersion, AdapterVersion | None]:
    candidate = versions.require_active(find_version(versions, ref))
    if against == BASE:
        return candidate, None
    try:
        other = find_version(versions, against if "@" in against else f"{candidate.name}@{against}")
    except UnknownVersion as error:
        raise UnknownVersion(
            error.problem, where=error.where, allowed=error.allowed, remedy="name a version, an alias or `base`"
        ) from None
    if (other.name, other.version) == (candidate.name, candidate.version):
        raise VoteError(f"{against!r} is the version itself", where=candidate.ref, remedy="compare with another one")
    return candidate, versions.require_active(other)


def _requests(request: ComparisonRequest, candidate: AdapterVersion, other: AdapterVersion | None) -> list[DrawRequest]:
    """Returns two requests per prompt: of the version, and of the other one."""
    count = len(request.prompts) * request.count
    if not 1 <= count <= MAX_PAIRS or request.count < 1:
        raise SettingsError(f"{count} pairs", allowed=f"1 to {MAX_PAIRS}: prompts times seeds")
    repeated = {prompt for prompt in request.prompts if request.prompts.count(prompt) > 1}
    if repeated:
        raise SettingsError(f"the prompt {sorted(repeated)[0][:80]!r} is repeated", remedy="raise the number of seeds")
    for prompt in request.prompts:
        if parse_prompt(prompt).adapters:
            raise SettingsError(f"the prompt {prompt[:80]!r} names an adapter", remedy="leave it out; both are added")
    return [
        DrawRequest(
            prompt if version is None else f"{prompt} <lora:{version.ref}:{request.weight:g}>",
            base=request.base,
            negative=request.negative,
            count=request.count,
            seed=request.seed,
            steps=request.steps,
            guidance=request.guidance,
            size=request.size,
            sampler=request.sampler,
        )
        for prompt in request.prompts
        for version in (candidate, other)
    ]


def _plain(image: bytes) -> bytes:
    """Returns an image as a PNG file of its pixels alone: without the prompt, which names the version."""
    from PIL import Image

    from lora_engine.data.images import encode_png

    with Image.open(io.BytesIO(image), formats=("PNG",)) as opened:
        if opened.width * opened.height > _MAX_PIXELS:
            raise SettingsError(f"an image of {opened.width} x {opened.height}", allowed=f"{_MAX_PIXELS} pixels")
        return encode_png(opened)


def _store(
    versions: Versions,
    candidate: AdapterVersion,
    other: AdapterVersion | None,
    files: Mapping[str, bytes],
    index: ComparisonIndex,
) -> ArtifactRef:
    artifact = versions.store.put_files(KIND, files)
    inputs = {"adapter": candidate.artifact, **({"against": other.artifact} if other is not None else {})}
    settings = {"candidate": index.candidate, "against": index.against, **index.settings}
    with verb_run(versions.lineage, "vote", {"verb": "vote", **settings}) as run:
        execution = describe_verb(
            run,
            KIND,
            "compare",
            [KIND, run.id],  # each comparison has an order of its own
            settings={"settings": settings},
            inputs=inputs,
            output=artifact,
        )
        versions.lineage.log_execution(execution, contents=versions.store.files(artifact))
    return artifact
