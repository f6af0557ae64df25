"""Is the local copy still the object? Local disk is a cache only; the bucket decides."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path

from training_ready.storage.errors import StorageError
from training_ready.storage.fingerprint import Fingerprint
from training_ready.storage.objects import ObjectStore


def cached_file(store: ObjectStore, key: str, path: Path) -> Path:
    """A local copy of the object at ``path``, downloaded unless the one there is whole and current.

    What was copied is noted beside it, in ``<name>.source.json``.

    Raises:
        StorageError: ``path`` holds a file that is no copy of ours, which is left alone.
    """
    info = store.head(key)
    note = path.with_name(path.name + ".source.json")
    source = {"uri": store.uri(key), "etag": info.etag, "size": info.size}
    if path.exists():
        if not note.exists():
            raise StorageError(
                f"{path} exists and is no copy of an object: choose another cache file, or remove it."
            )
        if _read_note(note) == {**source, "sha256": Fingerprint.of_file(path).sha256}:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with store.open(key) as reader, temporary.open("wb") as output:
            # What was opened counts, should the object have changed since it was looked at.
            source.update(etag=reader.info.etag, size=reader.info.size)
            while chunk := reader.read(1 << 20):
                output.write(chunk)
            output.flush()
            os.fsync(output.fileno())
        sha256 = Fingerprint.of_file(temporary).sha256
        # The note first: a copy without a note would be refused as somebody's own file, a note without its
        # copy is only a reason to download again.
        _write(note, json.dumps({**source, "sha256": sha256}, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read_note(note: Path) -> object:
    with suppress(ValueError):  # a damaged note describes nothing: download again
        return json.loads(note.read_text(encoding="utf-8"))
    return None


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("w", encoding="utf-8") as output:
        output.write(text)
        output.flush()
        os.fsync(output.fileno())
    os.replace(temporary, path)
