"""Is this text an ``s3://`` address or a bare key? Never both, and never guessed."""

from __future__ import annotations

import re
from typing import NamedTuple

from training_ready.storage.errors import StorageError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


class S3Uri(NamedTuple):
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def parse_s3_uri(text: str) -> S3Uri | None:
    """``s3://bucket/key`` as its parts (the key may be empty); None for text without any scheme, a bare key.

    Raises:
        StorageError: an ``s3://`` address without a bucket, or an address of another kind (``https://…``,
        ``gs://…``).
    """
    scheme = _SCHEME.match(text)
    if scheme is None:
        return None
    if scheme.group().lower() != "s3://":
        raise StorageError(f"'{text}' is an address of another kind: give s3://bucket/key, or a bare key.")
    bucket, _, key = text[len("s3://") :].partition("/")
    if not bucket:
        raise StorageError(f"'{text}' names no bucket: s3://bucket/key is expected.")
    return S3Uri(bucket, key)
