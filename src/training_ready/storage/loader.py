"""What does a data set say? JSON, JSON lines and text out of the bucket, whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from training_ready.storage.cache import cached_file
from training_ready.storage.compression import open_decompressed, strip_compression
from training_ready.storage.errors import ObjectNotFound, SettingsError, StorageError
from training_ready.storage.layout import locate, resolve_dataset
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings

_BOM = b"\xef\xbb\xbf"


class S3DatasetLoader:
    """Reads data sets of one bucket.

    Paths are ``s3://`` addresses or bare keys relative to the root prefix. Names that end in ``.gz`` or
    ``.zst`` are decompressed, except by :meth:`load_bytes`. What is not given is taken from the environment.
    """

    def __init__(
        self,
        bucket: str | None = None,
        endpoint_url: str | None = None,
        aws_access_key_id: str | None = None,
        aws_secret_access_key: str | None = None,
        region_name: str | None = None,
    ) -> None:
        if (aws_access_key_id is None) != (aws_secret_access_key is None):
            raise SettingsError(
                "Give access key and secret key together, or neither: halves of two pairs never fit."
            )
        self.settings = StorageSettings.from_environment(
            bucket=bucket,
            endpoint_url=endpoint_url,
            access_key_id=aws_access_key_id,
            secret_access_key=aws_secret_access_key,
            region=region_name,
        )

    def __repr__(self) -> str:
        return f"S3DatasetLoader({self.settings!r})"

    def object_exists(self, path: str) -> bool:
        """Whether the object is there; a bucket that cannot be asked is an error, not "no"."""
        store, key = self._at(path)
        return store.exists(key)

    def load_bytes(self, path: str) -> bytes:
        """The object's bytes as they are stored."""
        store, key = self._at(path)
        return store.get_bytes(key)

    def load_text(self, path: str) -> str:
        """The object as UTF-8 text, without a byte order mark. Raises StorageError with the offset of a bad byte."""
        stream, where = self._open(path)
        with stream:
            data = stream.read()
        try:
            return data.removeprefix(_BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            raise StorageError(
                f"{where}: not UTF-8 at byte {error.start}. Convert the file to UTF-8."
            ) from error

    def load_json(self, path: str) -> Any:
        """The object as one JSON document. Raises StorageError with line and column of what is no JSON."""
        stream, where = self._open(path)
        with stream:
            return parse_json(stream.read(), where=where)

    def stream_jsonl(self, path: str) -> Iterator[Any]:
        """The records of a JSON lines object, one at a time, each whole whatever its size.

        Raises:
            ObjectNotFound: at the call, if there is no such object.
            StorageError: while reading, at a line that is no JSON, with its number and byte offset.
        """
        stream, where = self._open(path)
        return parse_jsonl(stream, where=where)

    def list_datasets(self, prefix: str = "") -> list[str]:
        """The keys below a prefix, relative to the root prefix, ready for the other methods; no folders."""
        root = self.settings.root_prefix
        keys = (info.key for info in ObjectStore(self.settings).list(root + prefix.lstrip("/")))
        return [key.removeprefix(root) for key in keys if not key.endswith("/")]

    def _at(self, path: str) -> tuple[ObjectStore, str]:
        uri = locate(self.settings, path)
        return ObjectStore(self.settings, uri.bucket), uri.key

    def _open(self, path: str) -> tuple[BinaryIO, str]:
        store, key = self._at(path)
        return open_decompressed(store.open(key), key, where=store.uri(key)), store.uri(key)


def load_dataset_from_s3(
    dataset_name: str,
    category: str | None = None,
    cache_local: str | Path | None = None,
    bucket: str | None = None,
) -> Any:
    """Find a data set by its name and load it whole: ``.json`` as it is, ``.jsonl`` and ``.ndjson`` as a list.

    Args:
        cache_local: a local file to keep a copy in. It is compared with the bucket's object at every call.

    Raises:
        ObjectNotFound: no such data set; the message names every key tried.
        StorageError: it cannot be read, or its name says another format.
    """
    settings = StorageSettings.from_environment()
    uri = resolve_dataset(settings, dataset_name, category, bucket=bucket)
    kind = Path(strip_compression(uri.key)).suffix.lower()
    if kind not in (".json", ".jsonl", ".ndjson"):
        raise StorageError(f"{uri}: '{kind}' is no format that loads whole; .json, .jsonl and .ndjson are.")
    store = ObjectStore(settings, uri.bucket)
    raw: io.RawIOBase
    if cache_local is not None:
        raw = cached_file(store, uri.key, Path(cache_local)).open("rb", buffering=0)
    else:
        raw = store.open(uri.key)
    stream = open_decompressed(raw, uri.key, where=str(uri))
    if kind != ".json":
        return list(parse_jsonl(stream, where=str(uri)))
    with stream:
        return parse_json(stream.read(), where=str(uri))


def parse_json(data: bytes, *, where: str) -> Any:
    """One JSON document. Raises StorageError naming line and column of what is none."""
    try:
        return orjson.loads(data.removeprefix(_BOM))
    except orjson.JSONDecodeError as error:
        place = f"{where}:{error.lineno}:{error.colno}"
        raise StorageError(
            f"{place}: not JSON ({error.msg}), in {len(data)} bytes. Correct the file."
        ) from error


def parse_jsonl(stream: BinaryIO, *, where: str) -> Iterator[Any]:
    """The record of each line; blank lines and a byte order mark are passed over. Closes the stream at the end.

    Raises:
        StorageError: a line that is no JSON, with its number and byte offset (of the decompressed text).
    """
    offset = 0
    with stream:
        for number, line in enumerate(stream, start=1):
            text = line.removeprefix(_BOM) if number == 1 else line
            if not text.isspace() and text:
                try:
                    yield orjson.loads(text)
                except orjson.JSONDecodeError as error:
                    raise StorageError(
                        f"{where}:{number}: not JSON at byte offset {offset} ({error.msg}), in a line of {len(line)} "
                        "bytes. Correct or remove the line."
                    ) from error
            offset += len(line)


__all__ = [
    "ObjectNotFound",
    "S3DatasetLoader",
    "load_dataset_from_s3",
    "parse_json",
    "parse_jsonl",
]
