"""Lists a folder or bucket that a sensor watches."""

from __future__ import annotations

from typing import Any

from registry.store.remote_errors import malformed_url, with_context

_MARKS = ("ETag", "LastModified", "mtime", "updated", "last_modified", "modified", "created")


def list_folder(url: str) -> list[list[Any]]:
    """Returns name, size and the server's marks of change of each file below a URL that fsspec knows, by name.

    Raises:
        StoreError: It cannot be listed, or there is no such bucket.
    """
    from fsspec.core import url_to_fs

    with with_context(url):
        try:
            fs, root = url_to_fs(url)
        except (ImportError, ValueError):
            raise malformed_url(url) from None
        fs.invalidate_cache()
        bucket = root.lstrip("/").partition("/")[0]
        if not fs.exists(root):
            fs.info(bucket if url.startswith(("s3:", "gs:")) else root)
        entries = fs.find(root, detail=True)
    return [
        [name, info.get("size"), *(str(info[mark]) for mark in _MARKS if mark in info)]
        for name, info in sorted(entries.items())
    ]
