"""What is in a bucket, and how does it get there? Keys are full keys; the root prefix is the layout's."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from training_ready.storage.client import client_for
from training_ready.storage.errors import (
    ObjectChanged,
    ObjectNotFound,
    StorageError,
    UploadForgotten,
    code_of,
    is_expired,
    is_missing,
    is_wordless_refusal,
    no_bucket,
    status_of,
    translate,
)
from training_ready.storage.fingerprint import Fingerprint, part_bytes
from training_ready.storage.settings import StorageSettings
from training_ready.storage.traffic import Traffic

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

    from training_ready.storage.reader import RangedReader
    from training_ready.storage.shared_cache import BlockCache

__all__ = ["ObjectChanged", "ObjectInfo", "ObjectNotFound", "ObjectStore", "StorageError"]

_UPLOADS = 3  # of one file, where the server forgets one under way
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """One object. ``etag`` is without quotes.

    Known from ``head`` only: ``metadata`` (lower-case names), and whether the ETag can be an MD5 at all,
    which it is not for objects encrypted with a key of their own.
    """

    key: str
    size: int
    etag: str
    etag_is_hash: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)


class ObjectStore:
    """One bucket. Safe to share between threads, to pickle, and to use after a fork.

    With a ``cache``, what readers fetch is kept on the local disk, or in Redis, and shared by processes.
    """

    def __init__(
        self, settings: StorageSettings, bucket: str | None = None, *, cache: BlockCache | None = None
    ) -> None:
        self.settings = settings
        self.bucket = bucket or settings.bucket
        self.cache = cache
        self.traffic = Traffic()
        self.has_answered = False  # whether this bucket ever did

    def __repr__(self) -> str:
        return f"ObjectStore({self.uri('')!r} at {self.settings.endpoint_name!r})"

    def __reduce__(self) -> tuple[Callable[..., ObjectStore], tuple[StorageSettings, str, BlockCache | None]]:
        return _restored, (self.settings, self.bucket, self.cache)

    def with_cache(self, cache: BlockCache | None) -> ObjectStore:
        """The same bucket, read through a cache."""
        return ObjectStore(self.settings, self.bucket, cache=cache)

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def call(self, operation: str, key: str, request: Callable[[S3Client], Result]) -> Result:
        """Run one request. An expired token is renewed from the environment once; errors become ours.

        Raises:
            ObjectNotFound: there is no such object.
            StorageError: anything else, with the permission or the setting to look at.
        """
        try:
            return self.attempt(request)
        except (ClientError, BotoCoreError, OSError) as error:
            raise self.translated(error, operation, key) from error

    def attempt(self, request: Callable[[S3Client], Result]) -> Result:
        """Run one request with botocore's own errors; renew an expired token from the environment once."""
        used = self.settings  # another thread may renew them meanwhile
        try:
            result = request(client_for(used))
        except ClientError as error:
            renewed = used.reread() if is_expired(error) or is_wordless_refusal(error) else used
            if renewed == used:
                raise
            self.settings = renewed
            result = request(client_for(renewed))
        self.has_answered = True
        return result

    def translated(self, error: Exception, operation: str, key: str) -> StorageError:
        if is_missing(error) and operation == "HeadObject" and not self.bucket_exists():
            return no_bucket(self.uri(key))
        return translate(
            error,
            operation=operation,
            uri=self.uri(key),
            endpoint=self.settings.endpoint_name,
            keys_from=self.settings.credential_names,
        )

    def bucket_exists(self) -> bool:
        """False only when the server says so; credentials that may not ask count as "it exists"."""
        if not self.has_answered:
            try:
                self.attempt(lambda client: client.head_bucket(Bucket=self.bucket))
            except ClientError as error:
                if status_of(error) not in (403, 404):
                    raise self.translated(error, "HeadBucket", "") from error
                return status_of(error) == 403
            except (BotoCoreError, OSError) as error:
                raise self.translated(error, "HeadBucket", "") from error
        return True

    def create_bucket_if_missing(self) -> bool:
        """Create the bucket where it is missing; True when it was created."""
        if self.bucket_exists():
            return False
        region = self.settings.region
        # AWS refuses its own default region as a constraint; other servers accept none at all.
        place: dict[str, Any] = (
            {"CreateBucketConfiguration": {"LocationConstraint": region}}
            if region not in (None, "us-east-1") and self.settings.endpoint_url is None
            else {}
        )
        try:
            self.attempt(lambda client: client.create_bucket(Bucket=self.bucket, **place))
        except ClientError as error:
            if (
                code_of(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
                or not self.bucket_exists()
            ):
                raise self.translated(error, "CreateBucket", "") from error
            return False  # another process was faster
        except (BotoCoreError, OSError) as error:
            raise self.translated(error, "CreateBucket", "") from error
        return True

    def head(self, key: str) -> ObjectInfo:
        """Size and ETag of one object. Raises ObjectNotFound."""
        answer: Mapping[str, Any] = self.call(
            "HeadObject", key, lambda client: client.head_object(Bucket=self.bucket, Key=check_key(key))
        )
        metadata = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
        return ObjectInfo(
            key=key,
            size=answer["ContentLength"],
            etag=plain_etag(answer.get("ETag", "")),
            etag_is_hash="SSECustomerAlgorithm" not in answer
            and "kms" not in answer.get("ServerSideEncryption", ""),
            metadata=metadata,
        )

    def exists(self, key: str) -> bool:
        """Whether the object is there. A missing bucket or a refused request is an error, not "no"."""
        try:
            self.head(key)
        except ObjectNotFound:
            return False
        return True

    def holds(self, key: str, file: Fingerprint) -> bool:
        """Whether the object is there and certainly this file."""
        try:
            return file.proves(self.head(key))
        except ObjectNotFound:
            return False

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, in the order of the keys, page by page."""
        token = ""
        while True:
            request = partial(_page, bucket=self.bucket, prefix=prefix, token=token)
            page = self.call("ListObjectsV2", prefix, request)
            for item in page.get("Contents", []):
                yield ObjectInfo(key=item["Key"], size=item["Size"], etag=plain_etag(item.get("ETag", "")))
            if not page.get("IsTruncated"):
                return
            token = page["NextContinuationToken"]

    def open(self, key: str, **reading: Any) -> RangedReader:
        """A seekable reader pinned to the object as it is now; ``reading`` goes to :class:`RangedReader`."""
        from training_ready.storage.reader import RangedReader

        return RangedReader(self, key, **reading)

    def get_bytes(self, key: str) -> bytes:
        """The whole object, compared with its MD5 where its ETag is one. For objects that fit in memory."""
        with self.open(key, compare=True) as reader:
            return reader.read()

    def put_bytes(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write one object; the server compares it with the MD5 sent along and refuses damaged bytes."""
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")
        self.call(
            "PutObject",
            key,
            lambda client: client.put_object(
                Bucket=self.bucket,
                Key=check_key(key),
                Body=data,
                ContentMD5=digest,
                Metadata=dict(metadata or {}),
            ),
        )

    def put_file(
        self,
        key: str,
        path: Path,
        progress: Callable[[int], None] | None = None,
        *,
        fingerprint: Fingerprint | None = None,
    ) -> ObjectInfo:
        """Write a file of any size in parts, four at a time, then compare what arrived with what was sent.

        An upload that the server has forgotten, or a part of it, is begun anew, three uploads in all.

        Args:
            progress: called with the number of bytes just sent, from several threads; negative when some are
                sent again.
            fingerprint: the file's, if the caller already has it.

        Raises:
            UploadForgotten: the server forgot the last of the uploads, too.
            StorageError: the upload failed, or the stored object is not the file.
        """
        from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager

        if not path.is_file():
            raise StorageError(f"{path} is no file; nothing was written to {self.uri(key)}.")
        sent = fingerprint or Fingerprint.of_file(path)
        part = part_bytes(sent.size)
        config = TransferConfig(multipart_threshold=part, multipart_chunksize=part, max_concurrency=4)
        extra = {"Metadata": {"sha256": sent.sha256}}

        def upload(client: S3Client) -> None:
            done: list[int] = []
            counters = [ProgressCallbackInvoker(call) for call in (done.append, progress) if call]
            try:
                with create_transfer_manager(client, config) as manager:
                    manager.upload(str(path), self.bucket, check_key(key), extra, counters).result()
            except BaseException:
                if progress:
                    progress(-sum(done))
                raise

        for number in range(1, _UPLOADS + 1):
            try:
                self.call("PutObject", key, upload)
                break
            except UploadForgotten:
                # It may have been joined all the same, and the answer got lost.
                if self.holds(key, sent):
                    break
                if number == _UPLOADS:
                    raise
        stored = self.head(key)
        if sent.contradicts(stored):
            raise StorageError(
                f"{self.uri(key)} was written but is not {path}: {stored.size} bytes with ETag {stored.etag} "
                f"instead of {sent.size} bytes with MD5 {sent.md5}. Did the file change? Upload it again."
            )
        return stored

    def keep_on_disk(self, info: ObjectInfo, path: Path) -> None:
        """Lay the object that was just written from ``path`` into the cache, if there is one, for its readers."""
        if self.cache is not None:
            from training_ready.storage.ranges import lay_into_cache

            lay_into_cache(self, info, path, self.cache)

    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is no error, as in S3 itself."""
        self.call(
            "DeleteObject", key, lambda client: client.delete_object(Bucket=self.bucket, Key=check_key(key))
        )


def _restored(settings: StorageSettings, bucket: str, cache: BlockCache | None) -> ObjectStore:
    return ObjectStore(settings, bucket, cache=cache)


def _page(client: S3Client, *, bucket: str, prefix: str, token: str) -> ListObjectsV2OutputTypeDef:
    if token:
        return client.list_objects_v2(Bucket=bucket, Prefix=prefix, ContinuationToken=token)
    return client.list_objects_v2(Bucket=bucket, Prefix=prefix)


def plain_etag(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def check_key(key: str) -> str:
    """The key itself. Raises StorageError for one that is empty, climbs with ``..``, or is an address."""
    if not key or key.startswith("/") or "\0" in key or {".", ".."} & set(key.split("/")):
        raise StorageError(
            f"'{key}' is not a usable key: not empty, no leading /, no . or .. between slashes."
        )
    if "://" in key:
        raise StorageError(
            f"'{key}' is an address, not a key: parse it first, or give the part after the bucket."
        )
    return key
