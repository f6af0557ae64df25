"""How does one large file reach the bucket through an hour of bad network, and how is it known to be there?"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from training_ready.storage.fingerprint import Fingerprint, part_bytes
from training_ready.storage.objects import ObjectNotFound, ObjectStore, StorageError, plain_etag
from training_ready.storage.ranges import Patience
from training_ready.training.checkpoint_bucket import FileFacts

_PARTS_AT_ONCE = 4
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    data: bytes
    md5: bytes


def upload_file(store: ObjectStore, key: str, path: Path, *, patience: float) -> FileFacts:
    """Write a file to the bucket and compare what arrived; a file that is there already is not sent again.

    It is read once, in parts of at least 16 MiB; four are in memory. The server compares each part with its MD5. Any
    request that fails is tried again, with growing pauses, until ``patience`` seconds have brought no success.

    Raises:
        StorageError: nothing succeeded for ``patience`` seconds; or what is stored is not the file.
        OSError: the file cannot be read.
    """
    waiting = Patience(patience)
    while True:
        try:
            return _there_already(store, key, path) or _send(store, key, path, patience)
        except StorageError:  # also: the server has forgotten the upload and its parts, so begin anew
            if not waiting.pause():
                raise


def until_it_works(request: Callable[[], Result], patience: float) -> Result:
    """Ask again, with growing pauses, for ``patience`` seconds at most; what is not there stays not there.

    Raises:
        StorageError: the last error.
    """
    waiting = Patience(patience)
    while True:
        try:
            return request()
        except ObjectNotFound:
            raise
        except StorageError:
            if not waiting.pause():
                raise


def _there_already(store: ObjectStore, key: str, path: Path) -> FileFacts | None:
    try:
        stored = store.head(key)
    except ObjectNotFound:
        return None
    if stored.size != path.stat().st_size:
        return None
    here = Fingerprint.of_file(path)
    return FileFacts(bytes=here.size, sha256=here.sha256) if here.proves(stored) else None


def _send(store: ObjectStore, key: str, path: Path, patience: float) -> FileFacts:
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    parts = _parts(path, part_bytes(size), sha256.update)
    if size <= part_bytes(size):
        data = next(parts).data
        until_it_works(lambda: store.put_bytes(key, data), patience)
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
    else:
        etag = _send_parts(store, key, parts, patience)
    stored = until_it_works(lambda: store.head(key), patience)
    if stored.size != size or (stored.etag_is_hash and stored.etag not in (etag, "") and len(stored.etag) >= 32):
        raise StorageError(
            f"{store.uri(key)} was written but is not {path}: {stored.size} bytes with ETag {stored.etag} instead of "
            f"{size} bytes with {etag}"
        )
    return FileFacts(bytes=size, sha256=sha256.hexdigest())


def _parts(path: Path, part_size: int, seen: Callable[[bytes], None]) -> Iterator[_Part]:
    with path.open("rb") as file:
        number = 0
        while (data := file.read(part_size)) or number == 0:
            number += 1
            seen(data)
            yield _Part(number, data, hashlib.md5(data, usedforsecurity=False).digest())


def _send_parts(store: ObjectStore, key: str, parts: Iterator[_Part], patience: float) -> str:
    """Send the parts, four at a time, and join them; the ETag that S3 gives such an object."""
    target = {"Bucket": store.bucket, "Key": key}
    begun = until_it_works(
        lambda: store.call("CreateMultipartUpload", key, lambda client: client.create_multipart_upload(**target)),
        patience,
    )
    upload = {**target, "UploadId": begun["UploadId"]}

    def send(part: _Part) -> dict[str, object]:
        told = base64.b64encode(part.md5).decode("ascii")
        answer = until_it_works(
            lambda: store.call(
                "UploadPart",
                key,
                lambda client: client.upload_part(
                    **upload, PartNumber=part.number, Body=part.data, ContentMD5=told
                ),
            ),
            patience,
        )
        return {"PartNumber": part.number, "ETag": answer["ETag"], "md5": part.md5}

    try:
        done = list(_four_at_a_time(send, parts))
        listed = [{"PartNumber": one["PartNumber"], "ETag": one["ETag"]} for one in done]
        until_it_works(
            lambda: store.call(
                "CompleteMultipartUpload",
                key,
                lambda client: client.complete_multipart_upload(**upload, MultipartUpload={"Parts": listed}),
            ),
            patience,
        )
    except BaseException:
        _abandon(store, key, upload)
        raise
    joined = hashlib.md5(b"".join(one["md5"] for one in done), usedforsecurity=False)  # type: ignore[misc]
    return f"{joined.hexdigest()}-{len(done)}"
