"""The manifest beside each delivered adapter: what the target holds, by which event of which log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lora_engine.documents import parse_json
from lora_engine.files import canonical_json
from registry.errors import StoreError
from registry.store.trees import check_relative
from tasks.errors import DeliveryError
from tasks.operations.delivery_file import DeliveryLayout, DeliveryTarget
from tasks.operations.delivery_folder import TargetFolder

_SUFFIX = "loraline.json"
_MAX_NUMBER = 1 << 62
EventNumber = Annotated[int, Field(ge=1, le=_MAX_NUMBER)]


def _relative(path: str) -> str:
    try:
        return check_relative(path)
    except StoreError as error:
        raise ValueError(error.problem) from None


RelativePath = Annotated[str, AfterValidator(_relative)]


class DeliveredFile(BaseModel):
    """A file of a delivery: digest, and size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    size: Annotated[int, Field(ge=0, le=_MAX_NUMBER)]


class DeliveryManifest(BaseModel):
    """The content of `loraline.json`, which is written first and last.

    Attributes:
        state: `delivering` until all files are complete; `withdrawn` if they were removed.
        home: Digest of the first event of the registry's log, which identifies it.
        target: Name of the target.
        layout: Layout, with its revision: `comfyui-1`.
        name: The adapter.
        version: Its number.
        sha256: Digest of the registered adapter file.
        alias: The alias of the target.
        event: Number of the event that decided: an older one never replaces it.
        files: Path in the target -> digest and size.
        reason: Why the files were removed; empty for none.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    state: Literal["delivering", "delivered", "withdrawn"]
    home: str
    target: str
    layout: str
    name: str
    version: EventNumber
    sha256: str
    alias: str
    event: EventNumber
    files: Mapping[RelativePath, DeliveredFile] = Field(default_factory=dict)
    reason: str = ""

    @property
    def ref(self) -> str:
        """Returns `name@version`."""
        return f"{self.name}@{self.version}"

    def encode(self) -> bytes:
        """Returns the content of the file."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"


def manifest_path(path: str, layout: DeliveryLayout) -> str:
    """Returns the path of the manifest of a delivery: `NAME.loraline.json`, or `loraline.json` in its folder."""
    if layout == "huggingface":
        return f"{path}/{_SUFFIX}"
    return f"{path.removesuffix('.safetensors')}.{_SUFFIX}"


def read_manifests(folder: TargetFolder, target: DeliveryTarget) -> dict[str, DeliveryManifest]:
    """Returns all manifests of a target of this name, by their path; those of other targets in the folder are left out.

    Raises:
        DeliveryError: The target cannot be read, or a manifest is damaged.
    """
    manifests = {path: _read(folder, path) for path in folder.list_files(_SUFFIX)}
    return {path: manifest for path, manifest in manifests.items() if manifest.target == target.name}


def find_owner(folder: TargetFolder, path: str) -> DeliveryManifest | None:
    """Returns the manifest at a path, of whatever target; None if there is none."""
    return _read(folder, path) if folder.size(path) is not None else None


def _read(folder: TargetFolder, path: str) -> DeliveryManifest:
    where = f"{folder.where}/{path}"
    try:
        data: Any = parse_json(folder.read(path).decode("utf-8", "replace"), where, DeliveryError)
        return DeliveryManifest.model_validate(data)
    except (ValidationError, DeliveryError) as error:
        problem = error.problem if isinstance(error, DeliveryError) else error.errors(include_url=False)[0]["msg"]
        raise DeliveryError(
            f"the manifest is damaged: {problem}", where=where, remedy="remove it with the files beside it"
        ) from None
