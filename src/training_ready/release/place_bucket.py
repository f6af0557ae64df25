"""How does a bucket hold named contents? An object each; what may change is changed by conditional PUT.

A PUT with `If-None-Match: *` or `If-Match: <etag>` succeeds for one of several writers and is 412 for the others.
Not every server knows it, and those that do not answer 200: :meth:`BucketPlace.check_conditions` asks.
"""

from __future__ import annotations

import base64
import hashlib
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from training_ready.release.places import BLOCK, PlaceError, check_name
from training_ready.storage.errors import ObjectNotFound, StorageError, is_passing, status_of
from training_ready.storage.objects import ObjectStore

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_ATTEMPTS = 3
_LOST = (409, 412)  # 409: another conditional write of this key is under way


class BucketPlace:
    """Contents are the objects below `prefix`; what is still arriving lies in a temporary folder of this machine."""

    def __init__(self, store: ObjectStore, prefix: str, *, only_writer: bool = False) -> None:
        """Raises PlaceError when the server ignores conditions and the caller is not the `only_writer`."""
        self._store = store
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._local = tempfile.TemporaryDirectory(prefix="training-ready-")
        self._writing = threading.Lock()
        self._only_writer = only_writer
        if not only_writer:
            self.check_conditions()

    @property
    def where(self) -> str:
        return self._store.uri(self._prefix).rstrip("/")

    @property
    def exclusive(self) -> bool:
        """By the caller's promise alone: a bucket has no lock."""
        return self._only_writer

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    def check_conditions(self) -> None:
        """Try both conditions on an object of its own. Raises PlaceError when one of them is ignored."""
        name = f".conditions-{uuid.uuid4().hex}"
        try:
            created = self._put_if(name, b"1", IfNoneMatch="*")
            again = self._put_if(name, b"2", IfNoneMatch="*")
            moved = self._put_if(name, b"3", IfMatch='"00000000000000000000000000000000"')
        finally:
            self._store.delete(self._key(name))
        if not created or again or moved:
            ignored = "If-None-Match" if again else "If-Match" if moved else "writing a new object"
            raise PlaceError(
                f"{self._store.settings.endpoint_name} does not honour conditional writes ({ignored}), so two writers "
                f"could undo each other in {self.where}. If you are the only one who writes there, say --only-writer."
            )

    def read(self, name: str) -> bytes | None:
        return self._version(name)[0]

    def _version(self, name: str) -> tuple[bytes | None, str]:
        """A small object and its ETag by one GET, which a change meanwhile cannot mix."""
        key = self._key(name)

        def fetch(client: S3Client) -> tuple[bytes, str]:
            answer = client.get_object(Bucket=self._store.bucket, Key=key)
            return answer["Body"].read(), answer["ETag"]

        for attempt in range(_ATTEMPTS):
            try:
                return self._store.call("GetObject", key, fetch)
            except ObjectNotFound:
                return None, ""
            except StorageError as error:
                # Refusals were tried again by the client; a body that breaks off is beyond its retries.
                cause = error.__cause__
                if attempt == _ATTEMPTS - 1 or isinstance(cause, ClientError) or not is_passing(cause):
                    raise
        raise AssertionError("the loop returns or raises")

    def size(self, name: str) -> int | None:
        try:
            return self._store.head(self._key(name)).size
        except ObjectNotFound:
            return None

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        with self._store.open(self._key(name)) as reader:
            reader.seek(start)
            left = float("inf") if stop is None else stop - start
            while left > 0 and (block := reader.read(int(min(BLOCK, left)))):
                left -= len(block)
                yield block

    def names(self, prefix: str) -> Iterator[str]:
        for item in self._store.list(self._key(prefix)):
            yield item.key.removeprefix(self._prefix)

    def write(self, name: str, data: bytes) -> None:
        self._store.put_bytes(self._key(name), data)

    def swap(self, name: str, data: bytes, *, expected: bytes | None) -> bool:
        with self._writing:
            found, etag = self._version(name)
            if found != expected:
                return False
            condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": etag}
            # An answer that was lost is asked for again by the client, and the condition then no longer holds.
            return self._put_if(name, data, **condition) or self.read(name) == data

    def _put_if(self, name: str, data: bytes, **condition: str) -> bool:
        key = self._key(name)
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")
        sent: dict[str, Any] = {"Bucket": self._store.bucket, "Key": key, "Body": data, "ContentMD5": digest}
        try:
            self._store.attempt(lambda client: client.put_object(**(sent | condition)))
        except ClientError as error:
            if status_of(error) in _LOST:
                return False
            raise self._store.translated(error, "PutObject", key) from error
        except (BotoCoreError, OSError) as error:
            raise self._store.translated(error, "PutObject", key) from error
        return True

    def keep(self, name: str, spooled: Path) -> None:
        self.put_file(name, spooled)
        spooled.unlink()

    def put_file(self, name: str, path: Path) -> None:
        self._store.put_file(self._key(name), path)

    def move(self, name: str, to: str) -> None:
        source = {"Bucket": self._store.bucket, "Key": self._key(name)}
        self._store.call(
            "CopyObject",
            to,
            lambda client: client.copy(source, self._store.bucket, self._key(to)),  # type: ignore[arg-type]
        )
        self.delete(name)

    def delete(self, name: str) -> None:
        self._store.delete(self._key(name))

    def spool(self) -> Path:
        return Path(self._local.name) / uuid.uuid4().hex

    @contextmanager
    def sole_server(self) -> Iterator[None]:
        """Several servers may share a bucket: what they move, they move by conditional PUT."""
        yield
