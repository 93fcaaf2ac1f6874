"""Reads the declared parameters of a pipeline file, and the values that users give for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.refusals import explain, nearest
from flows.spec.document import PipelineDocument, secret_error
from flows.spec.references import PARAMETER_NAME, References, Resolved
from lora_engine.documents import Where, parse_value
from registry.store.redaction import has_secret, is_secret_key
from tasks.errors import SpecError

_SHOWN = 200
_MAX_PARAMETERS = 256
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "list": (list,),
}
_Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = str | bool | _Integer | _Number
_Bound = Annotated[int | float | None, Field(ge=-1e300, le=1e300)]


class Parameter(BaseModel):
    """A declared parameter of a pipeline file.

    Attributes:
        type: Type of the value; the default is that of `default`, of the first of `choices`, or string.
        default: Value if none is given; without one, a value must be given.
        choices: The allowed values; empty allows all.
        minimum: Smallest allowed number.
        maximum: Largest allowed number.
        description: Text for readers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["string", "integer", "number", "boolean", "list"] | None = None
    default: Scalar | list[Scalar] | None = None
    choices: list[Scalar] = []
    minimum: _Bound = None
    maximum: _Bound = None
    description: str = ""

    def type_name(self) -> str:
        """Returns the type of the values."""
        if self.type is not None:
            return self.type
        example = next((value for value in (self.default, *self.choices) if value is not None), "")
        return next((name for name in ("boolean", "integer", "number", "list") if _is(example, name)), "string")

    def check(self, name: str, value: Any, where: str) -> Any:
        """Returns a value, if it is allowed.

        Raises:
            SpecError: The value has another type, is no choice, or is out of bounds.
        """
        if not _is(value, self.type_name()):
            raise SpecError(
                f"parameter {name!r} is {_show(value)}", where=where, allowed=f"a value of type {self.type_name()}"
            )
        if self.choices and not any(value == choice and type(value) is type(choice) for choice in self.choices):
            raise SpecError(
                f"parameter {name!r} is {_show(value)}", where=where, **nearest(str(value), map(str, self.choices))
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            low = self.minimum is not None and value < self.minimum
            if low or (self.maximum is not None and value > self.maximum):
                bounds = [f"at least {self.minimum}"] * (self.minimum is not None)
                bounds += [f"at most {self.maximum}"] * (self.maximum is not None)
                raise SpecError(f"parameter {name!r} is {value!r}", where=where, allowed=" and ".join(bounds))
        return value

    def parse(self, name: str, value: Any, where: str) -> Any:
        """Returns the value of a text from the command line, a table or the environment; see `check`."""
        if isinstance(value, str) and self.type_name() != "string":
            value = parse_value(value, where, SpecError)
        return self.check(name, value, where)


def _is(value: Any, type_name: str) -> bool:
    if isinstance(value, list) and not all(isinstance(item, str | int | float) for item in value):
        return False
    return isinstance(value, _TYPES[type_name]) and isinstance(value, bool) == (type_name == "boolean")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def parse_parameters(texts: Iterable[str]) -> dict[str, str]:
    """Returns parameter -> text, of texts `NAME=VALUE`.

    Raises:
        SpecError: A text has another form, or two give the same parameter.
    """
    given: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not PARAMETER_NAME.fullmatch(name):
            # Without the rest, which may be a secret.
            raise SpecError(
                f"{name[:63]!r} is no parameter with a value", where="--param", allowed="NAME=VALUE, such as rank=8"
            )
        if name in given:
            raise SpecError(f"parameter {name!r} is given twice", where="--param", remedy="delete one of the two")
        given[name] = value
    return given


def read_declared(document: PipelineDocument) -> dict[str, Parameter]:
    """Returns the parameters that a file declares.

    Raises:
        SpecError: A name or a declaration is not valid.
    """
    raw = document.data.get("parameters") or {}
    if not isinstance(raw, Mapping) or len(raw) > _MAX_PARAMETERS:
        found = f"has {len(raw)} entries" if isinstance(raw, Mapping) else f"is {_show(raw)}"
        raise SpecError(
            f"parameters {found}",
            where=document.where(("parameters",)),
            allowed=f"at most {_MAX_PARAMETERS} parameters: name and default, or name and declaration",
        )
    return {name: _read_parameter(name, entry, document) for name, entry in raw.items()}


def check_parameter_name(name: str, what: str, where: str) -> None:
    """Refuses a name that no reference can have.

    Raises:
        SpecError: It has another form.
    """
    if not PARAMETER_NAME.fullmatch(name):
        raise SpecError(
            f"{what} {name[:63]!r}", where=where, allowed="a small letter, then at most 62 small letters, digits and _"
        )


def _read_parameter(name: str, raw: Any, document: PipelineDocument) -> Parameter:
    location: Where = ("parameters", name)
    check_parameter_name(name, "parameter", document.where(location))
    data = raw if isinstance(raw, Mapping) else {"default": raw}
    try:
        declared = Parameter.model_validate(data, strict=True)
    except ValidationError as error:
        raise explain(error, Parameter, location, document) from None
    if not (isinstance(declared.default, str) and "$" in declared.default):
        where = document.where((*location, "default"))
        if declared.default is not None:
            declared.check(name, declared.default, where)
    for choice in declared.choices:
        declared.check(name, choice, document.where((*location, "choices")))
    return declared


def resolve_parameters(
    document: PipelineDocument, declared: Mapping[str, Parameter], given: Mapping[str, Any], axes: Iterable[str] = ()
) -> References:
    """Returns the references of a file with the values of its parameters.

    Args:
        document: The file.
        declared: Its parameters.
        given: Values from outside; a text is parsed by the type of its parameter.
        axes: Parameters to which the matrix gives a value.

    Raises:
        SpecError: A value is for no parameter, is not allowed, or is a secret.
    """
    values: dict[str, Resolved] = {}
    axes = set(axes)
    for name, value in given.items():
        where = f"--param {name}"
        if name in axes:
            raise SpecError(
                f"{name!r} is an axis of the matrix", where=where, remedy="select pipelines by name, with --pipeline"
            )
        if name not in declared:
            raise SpecError(f"unknown parameter {name!r}", where=where, **nearest(name, declared))
        if isinstance(value, str) and (is_secret_key(name) or has_secret(value)):
            raise secret_error(f"parameter {name!r}", where)
        values[name] = Resolved(declared[name].parse(name, value, where))
    environment = References({})
    unset: dict[str, str] = {}
    for name, parameter in declared.items():
        where = document.where(("parameters", name))
        if name in values:
            continue
        if "default" not in parameter.model_fields_set:
            unset[name] = where
        else:
            values[name] = _resolve_default(name, parameter, environment, where)
    return References(values, unset)


def _resolve_default(name: str, parameter: Parameter, environment: References, where: str) -> Resolved:
    if not isinstance(parameter.default, str):
        return Resolved(parameter.default)
    try:
        resolved = environment.resolve(parameter.default, lambda: where)
    except SpecError as error:
        if "names no parameter" not in error.problem:
            raise
        raise SpecError(
            f"the default of {name!r} refers to another parameter",
            where=where,
            allowed="${env:NAME}, and text without references",
        ) from None
    if "$" not in parameter.default:
        return resolved
    value = resolved.value
    # The declared type decides, not the form of the text.
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if resolved.secret is not None:
        return Resolved(text, resolved.secret)
    return Resolved(parameter.parse(name, text, where))
