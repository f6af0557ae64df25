"""What does this corpus hold? Its table of contents, written last: where it stands, every shard stands."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import AwareDatetime, Field, PrivateAttr, ValidationError, model_validator

from training_ready import TrainingReadyError
from training_ready.corpus.record import (
    Closed,
    NonBlank,
    ObjectDigest,
    PiiStatus,
    Sha256,
    Split,
    Stage,
    TargetRole,
)
from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.storage.uri import parse_s3_uri


class ManifestError(TrainingReadyError):
    """A manifest that is not there, or that does not add up."""


class StoredObject(Closed):
    """One object of the corpus: full key in the manifest's bucket, size, SHA-256 (hex) and records."""

    key: NonBlank
    bytes: int = Field(ge=0)
    sha256: ObjectDigest
    records: int = Field(ge=0)


class RowGroup(Closed):
    """The bytes [offset, offset + bytes) of a shard: rows that can be read, and proven, without the rest of it."""

    records: int = Field(ge=1)
    offset: int = Field(ge=0)
    bytes: int = Field(ge=1)
    sha256: ObjectDigest


class Shard(StoredObject):
    """One Parquet object: its row groups in order, then the footer, whose SHA-256 is that of all bytes after them."""

    split: Split
    row_groups: list[RowGroup]
    footer_sha256: ObjectDigest

    @model_validator(mode="after")
    def _row_groups_add_up(self) -> Shard:
        _require_sum(f"{self.key}: row groups", [group.records for group in self.row_groups], self.records)
        return self


class InputObject(Closed):
    """One object that the corpus was made of, as it was read."""

    source: NonBlank
    uri: NonBlank
    bytes: int = Field(ge=0)
    etag: str
    sha256: ObjectDigest


class SourceCounts(Closed):
    """What became of every row of one source.

    ``crisis_rejected`` counts the rejected rows that speak of a crisis or belong to the stage of crises: somebody
    should look at them (``rejected_rows`` lists where they stand). ``licenses`` counts the kept records under each
    licence; ``moved`` those that left their publisher's split because their group was held out further;
    ``unused_fields`` are fields of the rows that reached no record. ``pii_status`` and ``consent`` are what the source
    declares; None where it says nothing.
    """

    name: NonBlank
    family: NonBlank
    records_in: int = Field(ge=0)
    kept: int = Field(ge=0)
    rejected: dict[str, int] = Field(default_factory=dict)
    splits: dict[Split, int] = Field(default_factory=dict)
    licenses: dict[str, int] = Field(default_factory=dict)
    moved: int = Field(default=0, ge=0)
    crisis_rejected: int = Field(default=0, ge=0)
    unused_fields: list[str] = Field(default_factory=list)
    pii_status: PiiStatus | None = None
    consent: NonBlank | None = None

    @property
    def license(self) -> str:
        """All licences of the kept records, as one text."""
        return ", ".join(sorted(self.licenses))

    @model_validator(mode="after")
    def _every_row_is_accounted_for(self) -> SourceCounts:
        _require_sum(
            f"source {self.name!r}: kept + rejected", [self.kept, *self.rejected.values()], self.records_in
        )
        _require_sum(f"source {self.name!r}: records per split", self.splits.values(), self.kept)
        _require_sum(f"source {self.name!r}: records per licence", self.licenses.values(), self.kept)
        return self


class Manifest(Closed):
    """Table of contents of a corpus. ``tokens`` stays empty: no tokenizer has counted yet.

    ``spec_sha256``, ``inputs`` and ``pipeline_version`` decide the records: if all are equal, a build is reused.
    """

    version: Literal[2] = 2
    name: NonBlank
    generated_at: AwareDatetime
    pipeline_version: NonBlank
    spec_sha256: Sha256
    spec: dict[str, Any]
    records: int = Field(ge=1)
    splits: dict[Split, int]
    stages: dict[Stage, int]
    target_roles: dict[TargetRole, int]
    tokens: int | None = None
    holdout_families: list[str]
    sources: list[SourceCounts]
    inputs: list[InputObject]
    shards: list[Shard]
    rejected_rows: StoredObject | None = None

    _sha256: str = PrivateAttr(default="")
    _uri: str = PrivateAttr(default="")

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        for what, parts in (
            ("records per split", self.splits.values()),
            ("records per stage", self.stages.values()),
            ("records per target role", self.target_roles.values()),
            ("records kept of the sources", [source.kept for source in self.sources]),
        ):
            _require_sum(what, parts, self.records)
        found: Counter[str] = Counter()
        for shard in self.shards:
            found[shard.split] += shard.records
        if +found != +Counter(self.splits):
            raise ValueError(f"the shards hold {dict(found)} records, the manifest counts {self.splits}")
        return self

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the manifest's bytes as they are stored."""
        return self._sha256

    @property
    def uri(self) -> str:
        """Where it was loaded from."""
        return self._uri

    def shards_of(self, split: str) -> list[Shard]:
        """The shards of one split, in order; none if the split is empty."""
        return [shard for shard in self.shards if shard.split == split]

    def stored_bytes(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def load(cls, store: ObjectStore, key: str) -> Manifest:
        """The manifest at a full key of the store's bucket, or at an ``s3://`` URI. Raises :class:`ManifestError`."""
        uri = parse_s3_uri(key)
        if uri is not None:
            store, key = (
                (store if uri.bucket == store.bucket else ObjectStore(store.settings, uri.bucket)),
                uri.key,
            )
        try:
            data = store.get_bytes(key)
        except ObjectNotFound as error:
            raise ManifestError(
                f"{store.uri(key)}: there is no manifest, so there is no finished corpus. Build it with "
                "`training-ready data build SPEC.yaml`, or correct the key (final_dataset/<name>/manifest.json)"
            ) from error
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5]
            )
            raise ManifestError(
                f"{store.uri(key)} is not a usable manifest: {faults}. Delete it and build the corpus again"
            ) from error
        manifest._sha256 = hashlib.sha256(data).hexdigest()
        manifest._uri = store.uri(key)
        return manifest


def _require_sum(what: str, parts: Iterable[int], total: int) -> None:
    parts = list(parts)
    if sum(parts) != total:
        raise ValueError(f"{what}: {' + '.join(map(str, parts)) or 0} = {sum(parts)}, expected {total}")
