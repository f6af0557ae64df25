"""Does this corpus stand already, may it be replaced, and is it whole? The manifest is written when all else stands."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from training_ready import __version__
from training_ready.corpus.assemble import Assembled, Assembly, BuildError, Progress
from training_ready.corpus.inputs import Input, find_inputs
from training_ready.corpus.manifest import InputObject, Manifest
from training_ready.corpus.record import SPLITS, canonical_json
from training_ready.corpus.spec import CorpusSpec
from training_ready.storage.objects import ObjectNotFound, ObjectStore, StorageError

PIPELINE_VERSION = f"{__version__}+corpus.2"
"""Counts up when the same input would give other records: then no earlier corpus counts as the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """The outcome. ``superseded`` lists the shards of the replaced corpus: left in place for readers in flight."""

    manifest: Manifest
    reused: bool
    superseded: list[str] = field(default_factory=list)


class Silent:
    """Shows no progress."""

    def begin(self, what: str, total: int) -> None:
        pass

    def advance(self, done: int) -> None:
        pass


def build_corpus(
    spec: CorpusSpec,
    store: ObjectStore,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    processed_at: datetime | None = None,
) -> Build:
    """Builds ``final_dataset/<name>/`` in the store's bucket, or finds it there, built from the same things.

    Args:
        replace: build although a different corpus of this name stands. Its manifest is kept as
            ``manifest.<12 digits>.json`` and its shards stay, so that whoever reads it can finish.
        processed_at: the time that records and manifest bear; now, unless given.

    Raises:
        SourceError: an input is missing, changes meanwhile, or cannot be read.
        BuildError: another corpus stands there, or a source gave no record.
        StorageError: the bucket failed, or gave back something else than was written.
    """
    progress = progress or Silent()
    prefix = f"{store.settings.root_prefix}final_dataset/{spec.name}/"
    inputs = find_inputs(spec, store)
    previous = (
        Manifest.load(store, prefix + "manifest.json") if store.exists(prefix + "manifest.json") else None
    )
    if previous is not None:
        changes = _changes_since(previous, spec, inputs, progress) + _missing_shards(previous, store)
        if not changes:
            return Build(manifest=previous, reused=True)
        if not replace:
            raise BuildError(
                f"{previous.uri} stands already, and differs from what would be built: {'; '.join(changes)}. Choose "
                "another name: in the specification, or build with --replace"
            )
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        processed_at = processed_at or datetime.now(UTC)
        assembly = Assembly(
            spec,
            store,
            Path(folder),
            prefix=prefix,
            suffix=f"-{previous.sha256[:8]}" if previous else "",
            pipeline_version=PIPELINE_VERSION,
            processed_at=processed_at,
            progress=progress,
        )
        manifest = _manifest(spec, inputs, assembly.run(inputs), processed_at)
    if previous is not None:
        store.put_bytes(
            f"{prefix}manifest.{previous.sha256[:12]}.json", store.get_bytes(prefix + "manifest.json")
        )
    written = _write_manifest(store, prefix + "manifest.json", manifest)
    return Build(
        manifest=written,
        reused=False,
        superseded=[shard.key for shard in previous.shards] if previous else [],
    )


def _manifest(
    spec: CorpusSpec, inputs: list[Input], assembled: Assembled, generated_at: datetime
) -> Manifest:
    splits = {split: sum(source.splits[split] for source in assembled.sources) for split in SPLITS}
    return Manifest.model_validate(
        {
            "name": spec.name,
            "generated_at": generated_at,
            "pipeline_version": PIPELINE_VERSION,
            "spec_sha256": _spec_sha256(spec),
            "spec": spec.model_dump(mode="json"),
            "records": sum(splits.values()),
            "splits": splits,
            "stages": assembled.stages,
            "target_roles": assembled.target_roles,
            "holdout_families": spec.holdout_families,
            "sources": assembled.sources,
            "inputs": [
                InputObject(
                    source=one.source.name, uri=one.uri, bytes=one.size, etag=one.etag, sha256=one.sha256
                )
                for one in inputs
            ],
            "shards": assembled.shards,
            "rejected_rows": assembled.rejected_rows,
        }
    )


def _write_manifest(store: ObjectStore, key: str, manifest: Manifest) -> Manifest:
    """Writes the manifest in one piece and returns it as the bucket gives it back."""
    data = manifest.stored_bytes()
    store.put_bytes(key, data)
    written = Manifest.load(store, key)
    if written.sha256 != hashlib.sha256(data).hexdigest():
        raise StorageError(
            f"{store.uri(key)}: another manifest was read back than was written; is another build running?"
        )
    return written


def _spec_sha256(spec: CorpusSpec) -> str:
    """Over what the specification says, not over its comments and layout."""
    return "sha256:" + hashlib.sha256(canonical_json(spec.model_dump(mode="json")).encode()).hexdigest()


def _changes_since(
    previous: Manifest, spec: CorpusSpec, inputs: list[Input], progress: Progress
) -> list[str]:
    """Why a build now would give another corpus; empty if it would not."""
    changes = []
    if previous.pipeline_version != PIPELINE_VERSION:
        changes.append(f"its pipeline was {previous.pipeline_version}, this is {PIPELINE_VERSION}")
    if previous.spec_sha256 != _spec_sha256(spec):
        now = spec.model_dump(mode="json")
        keys = [key for key in {**previous.spec, **now} if previous.spec.get(key) != now.get(key)]
        changes.append(f"the specification changed in {', '.join(keys)}")
    before = {one.uri: one for one in previous.inputs}
    for one in inputs:
        old = before.pop(one.uri, None)
        if old is None:
            changes.append(f"{one.uri} is new")
        elif one.size != old.bytes:
            changes.append(f"{one.uri} has {one.size:,} bytes, had {old.bytes:,}")
        elif one.etag != old.etag:  # uploaded again, perhaps with the same content
            progress.begin("comparing", one.size)
            if one.hash(progress.advance) != old.sha256:
                changes.append(f"{one.uri} has other content")
    return changes + [f"{uri} is no longer an input" for uri in before]


def _missing_shards(manifest: Manifest, store: ObjectStore) -> list[str]:
    faults = []
    for shard in manifest.shards:
        try:
            size = store.head(shard.key).size
        except ObjectNotFound:
            faults.append(f"{shard.key} is missing")
        else:
            if size != shard.bytes:
                faults.append(f"{shard.key} has {size:,} bytes, should have {shard.bytes:,}")
    return faults
