"""How does one large file reach the bucket through an hour of bad network, and how is it known to be there?"""

from __future__ import annotations

import base64
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from botocore import xform_name

from training_ready.storage.errors import UploadForgotten
from training_ready.storage.fingerprint import Fingerprint, part_bytes
from training_ready.storage.objects import ObjectNotFound, ObjectStore, StorageError
from training_ready.storage.ranges import Patience
from training_ready.training.checkpoint_bucket import FileFacts

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PARTS_AT_ONCE = 4
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    data: bytes
    md5: bytes


def upload_file(store: ObjectStore, key: str, path: Path, *, patience: float) -> FileFacts:
    """Write a file to the bucket and compare what arrived; a file that is there already is not sent again.

    It is read once, in parts of at least 16 MiB, of which four are in memory. The server compares each part with its
    MD5. Whatever fails is tried again, with growing pauses, until ``patience`` seconds have brought no success.

    Raises:
        StorageError: nothing succeeded for ``patience`` seconds, or what is stored is not the file.
        OSError: the file cannot be read.
    """
    waiting = Patience(patience)
    while True:
        try:
            return _there_already(store, key, path) or _send(store, key, path, patience)
        except StorageError:  # among them a server that has forgotten the upload and its parts: begin anew
            if not waiting.pause():
                raise


def until_it_works(request: Callable[[], Result], patience: float) -> Result:
    """Ask again, with growing pauses, for ``patience`` seconds at most; what is not there, or forgotten, stays so.

    Raises:
        StorageError: the last error.
    """
    waiting = Patience(patience)
    while True:
        try:
            return request()
        except (ObjectNotFound, UploadForgotten):
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
    part_size = part_bytes(path.stat().st_size)
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    size, parts_md5 = 0, b""

    def parts() -> Iterator[_Part]:
        nonlocal size, parts_md5
        with path.open("rb") as file:
            number = 0
            while (data := file.read(part_size)) or number == 0:  # an empty file is one empty part
                number, size = number + 1, size + len(data)
                sha256.update(data)
                md5.update(data)
                part = _Part(number, data, hashlib.md5(data, usedforsecurity=False).digest())
                parts_md5 += part.md5
                yield part

    if path.stat().st_size <= part_size:
        for only in parts():
            until_it_works(lambda data=only.data: store.put_bytes(key, data), patience)  # type: ignore[misc]
        parts_etag = None
    else:
        count = _send_parts(store, key, parts(), patience)
        parts_etag = f"{hashlib.md5(parts_md5, usedforsecurity=False).hexdigest()}-{count}"
    sent = Fingerprint(size=size, sha256=sha256.hexdigest(), md5=md5.hexdigest(), parts_etag=parts_etag)
    stored = until_it_works(lambda: store.head(key), patience)
    if sent.contradicts(stored):
        raise StorageError(
            f"{store.uri(key)} was written but is not {path}: {stored.size} bytes with ETag {stored.etag} instead of "
            f"{sent.size} bytes with MD5 {sent.md5}"
        )
    return FileFacts(bytes=sent.size, sha256=sent.sha256)


def _send_parts(store: ObjectStore, key: str, parts: Iterator[_Part], patience: float) -> int:
    """Send the parts, four at a time, and join them; how many there were."""

    def call(operation: str, **arguments: Any) -> Any:
        target = {"Bucket": store.bucket, "Key": key, **arguments}

        def request(client: S3Client) -> Any:
            return getattr(client, xform_name(operation))(**target)

        return until_it_works(lambda: store.call(operation, key, request), patience)

    upload = call("CreateMultipartUpload")["UploadId"]

    def send(part: _Part) -> dict[str, Any]:
        told = base64.b64encode(part.md5).decode("ascii")
        answer = call("UploadPart", UploadId=upload, PartNumber=part.number, Body=part.data, ContentMD5=told)
        return {"PartNumber": part.number, "ETag": answer["ETag"]}

    try:
        sent = list(_a_few_at_a_time(send, parts))
        call("CompleteMultipartUpload", UploadId=upload, MultipartUpload={"Parts": sent})
    except StorageError as error:
        _abandon(store, key, upload, error)
        raise
    return len(sent)


def _a_few_at_a_time(
    send: Callable[[_Part], dict[str, Any]], parts: Iterator[_Part]
) -> Iterator[dict[str, Any]]:
    """The answers in order; the next part is read when one has been answered."""
    under_way: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="upload") as threads:
        try:
            for part in parts:
                under_way.append(threads.submit(send, part))
                del part
                if len(under_way) == _PARTS_AT_ONCE:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _abandon(store: ObjectStore, key: str, upload: str, error: StorageError) -> None:
    """Parts that nobody joins would be stored, and paid, for ever."""
    try:
        store.call(
            "AbortMultipartUpload",
            key,
            lambda client: client.abort_multipart_upload(Bucket=store.bucket, Key=key, UploadId=upload),
        )
    except StorageError as second:
        error.add_note(
            f"and its parts could not be removed ({second}); a lifecycle rule of the bucket can do that"
        )
