"""Does this bucket do what training needs? Proven by doing it, step by step."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from training_ready.storage.errors import StorageError, code_of, is_rejected
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings

Outcome = Literal["proven", "failed", "not tried"]
STEPS = ("settings", "endpoint", "credentials", "list", "write", "read", "range", "delete")
_PROBE_BYTES = 4096


@dataclass(kw_only=True, slots=True)
class Step:
    name: str
    outcome: Outcome = "not tried"
    detail: str = ""


@dataclass(kw_only=True, slots=True)
class Verification:
    """What was proven. ``passed`` only if every step was."""

    endpoint: str
    bucket: str
    prefix: str
    steps: list[Step] = field(default_factory=lambda: [Step(name=name) for name in STEPS])

    @property
    def passed(self) -> bool:
        return all(step.outcome == "proven" for step in self.steps)

    def mark(self, name: str, outcome: Outcome, detail: str = "") -> None:
        step = next(step for step in self.steps if step.name == name)
        step.outcome, step.detail = outcome, detail

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def verify_store(settings: StorageSettings, *, prefix: str = "") -> Verification:
    """Write a small random object below ``prefix``, read it back, compare, delete it, and see that it is gone.

    ``prefix`` is relative to the root prefix. Nothing else in the bucket is touched.
    """
    store = ObjectStore(settings)
    place = f"{settings.root_prefix}{prefix.strip('/') + '/' if prefix.strip('/') else ''}"
    result = Verification(endpoint=settings.endpoint_name, bucket=store.bucket, prefix=place)
    try:
        settings.require_credentials()
    except StorageError as error:
        result.mark("settings", "failed", str(error))
        return result
    result.mark("settings", "proven", f"credentials from {settings.credential_names}")
    if _reach(store, place, result):
        _round_trip(store, f"{place}training-ready-verify-{secrets.token_hex(8)}", result)
    return result


def _reach(store: ObjectStore, prefix: str, result: Verification) -> bool:
    """One listing tells whether the endpoint answers, knows the credentials, has the bucket and lets us list it."""
    try:
        page = store.attempt(
            lambda client: client.list_objects_v2(Bucket=store.bucket, Prefix=prefix, MaxKeys=10)
        )
    except ClientError as error:
        result.mark("endpoint", "proven", "it answers")
        reason = str(store.translated(error, "ListObjectsV2", prefix))
        if is_rejected(error):
            result.mark("credentials", "failed", reason)
            return False
        result.mark("credentials", "proven", "the server knows them")
        result.mark("list", "failed", reason)
        return code_of(error) != "NoSuchBucket"
    except (StorageError, BotoCoreError, OSError) as error:
        shown = error if isinstance(error, StorageError) else store.translated(error, "ListObjectsV2", prefix)
        result.mark("endpoint", "failed", str(shown))
        return False
    result.mark("endpoint", "proven", "it answers")
    result.mark("credentials", "proven", "the server knows them")
    more = "at least " if page.get("IsTruncated") else ""
    result.mark("list", "proven", f"{more}{page.get('KeyCount', 0)} objects below '{prefix}'")
    return True


def _round_trip(store: ObjectStore, key: str, result: Verification) -> None:
    sent = secrets.token_bytes(_PROBE_BYTES)

    def read() -> str:
        return _same(store.get_bytes(key), sent, "read back, the same")

    def read_range() -> str:
        with store.open(key, ahead=False) as reader:
            reader.seek(1000)
            return _same(reader.read(100), sent[1000:1100], "of a range from the middle, the same")

    def delete() -> str:
        store.delete(key)
        if store.exists(key):
            raise StorageError(f"{store.uri(key)} is still there after its deletion. Remove it by hand.")
        return "deleted, and gone"

    def write() -> str:
        store.put_bytes(key, sent)
        return f"{len(sent)} random bytes at {store.uri(key)}"

    if _try("write", write, result):
        _try("read", read, result)
        _try("range", read_range, result)
        _try("delete", delete, result)


def _try(name: str, action: Callable[[], str], result: Verification) -> bool:
    try:
        result.mark(name, "proven", action())
    except StorageError as error:
        result.mark(name, "failed", str(error))
        return False
    return True


def _same(received: bytes, expected: bytes, word: str) -> str:
    if received != expected:
        raise StorageError(f"{len(received)} bytes came back that differ from the {len(expected)} written.")
    return f"{len(received)} bytes {word}"
