"""Reads tables of images: Hugging Face's parquet shards and `save_to_disk` folders, and tables of captions.

Only a child process imports this (`decoder_child`), because a small table may claim any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lora_engine.data.archives import MAX_MEMBER_BYTES, MAX_MEMBERS
from lora_engine.data.metadata import CAPTION_COLUMNS, FILE_COLUMNS
from lora_engine.errors import DataError

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture")
_ROWS = 16
TableFrame = tuple[dict[str, Any], bytes]
"""`row`, `path` (None if the row states none) and `captions`, with the bytes of the image if the row has them."""


def read_image_table(file: IO[bytes], name: str) -> Iterator[TableFrame]:
    """Yields the rows of a table in its order.

    Args:
        file: The table, in Parquet's format, or in Arrow's for a name that ends in `.arrow`.
        name: Its name.

    Raises:
        DataError: It is broken, or has no column of a usual name.
    """
    count = 0
    try:
        schema, batches = _open(file, name)
        image = _image_column(schema)
        path = _first(schema, FILE_COLUMNS)
        caption = _first(schema, (*CAPTION_COLUMNS, "captions"))
        if image is None and path is None:
            raise DataError("has neither images nor their names", allowed=", ".join((*_IMAGE_COLUMNS, *FILE_COLUMNS)))
        wanted = [column for column in (image, path, caption) if column]
        for batch in batches(wanted):
            for values in batch.select(wanted).to_pylist():
                yield _row(count, values, image, path, caption)
                count += 1
                if count > MAX_MEMBERS:
                    raise DataError(f"has more than {MAX_MEMBERS:,} rows")
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, UnicodeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"is broken after {count} rows ({reason})") from None


def _open(file: IO[bytes], name: str) -> tuple[pa.Schema, Any]:
    if name.lower().endswith(".arrow"):
        stream = pa.ipc.open_stream(file)
        return stream.schema, lambda _: stream
    table = pq.ParquetFile(file)
    return table.schema_arrow, lambda columns: table.iter_batches(_ROWS, columns=columns, use_threads=False)


def _row(
    number: int, values: Mapping[str, Any], image: str | None, path: str | None, caption: str | None
) -> TableFrame:
    stored = values[image] if image is not None else None
    nested = stored if isinstance(stored, dict) else {"bytes": stored}
    content = nested.get("bytes") or b""
    stated = (values[path] if path is not None else None) or nested.get("path")
    text = values[caption] if caption is not None else ""
    texts = [*filter(None, text if isinstance(text, list) else [text])]
    facts: dict[str, Any] = {"row": number, "path": stated or None, "captions": texts}
    if len(content) > MAX_MEMBER_BYTES:
        return facts | {"problem": f"has {len(content):,} bytes; allowed: at most {MAX_MEMBER_BYTES:,}"}, b""
    if not content and not facts["path"]:
        return facts | {"problem": "has no image"}, b""
    return facts, content


def _image_column(schema: pa.Schema) -> str | None:
    usable = [field.name for field in schema if _is_image(field.type, field.name)]
    return next((name for name in _IMAGE_COLUMNS if name in usable), usable[0] if usable else None)


def _is_image(kind: pa.DataType, name: str) -> bool:
    if pa.types.is_struct(kind):
        return any(
            kind.field(index).name == "bytes" and _is_binary(kind.field(index).type) for index in range(len(kind))
        )
    return _is_binary(kind) and name in _IMAGE_COLUMNS


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(schema: pa.Schema, name: str) -> bool:
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _first(schema: pa.Schema, names: Sequence[str]) -> str | None:
    return next((name for name in names if _is_text(schema, name)), None)
