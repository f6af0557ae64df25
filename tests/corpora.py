"""Corpora of any rows, written as a build would write them but judged by nobody."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training_ready.corpus.manifest import Manifest, Shard, SourceCounts
from training_ready.corpus.record import Message, content_hash
from training_ready.corpus.shards import SHARD_SCHEMA, describe_shard
from training_ready.storage.objects import ObjectStore

Turns = Sequence[tuple[str, str]]


def put_shard(
    store: ObjectStore, key: str, rows: Sequence[Any], row_group_records: int = 1000, split: Any = "train"
) -> Shard:
    """Write rows as one corpus shard."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        table = pa.Table.from_pylist(list(rows), schema=SHARD_SCHEMA)
        pq.write_table(table, file.name, row_group_size=row_group_records)
        store.put_file(key, Path(file.name))
        return describe_shard(Path(file.name), key, split)


def put_corpus(
    store: ObjectStore, name: str, splits: Mapping[str, Sequence[Any]], row_group_records: int = 1000
) -> str:
    """Write rows as a corpus, whatever is wrong with them; returns the key of its manifest."""
    shards = []
    for split, rows in splits.items():
        key = f"final_dataset/{name}/{split}/shard-00000.parquet"
        shards.append(put_shard(store, key, rows, row_group_records, split))
    total = [one for rows in splits.values() for one in rows]
    counts = {split: len(rows) for split, rows in splits.items()}
    source = SourceCounts(
        name="calls",
        family="calls",
        records_in=len(total),
        kept=len(total),
        splits=counts,  # type: ignore[arg-type]
        licenses={"cc0-1.0": len(total)},
    )
    manifest = Manifest(
        name=name,
        generated_at=datetime(2026, 1, 1, tzinfo=UTC),
        pipeline_version="1",
        spec_sha256="sha256:" + "0" * 64,
        spec={},
        records=len(total),
        splits=counts,  # type: ignore[arg-type]
        stages=_count(total, "stage"),
        target_roles=_count(total, "target_role"),
        holdout_families=[],
        sources=[source],
        inputs=[],
        shards=shards,
    )
    key = f"final_dataset/{name}/manifest.json"
    store.put_bytes(key, manifest.stored_bytes())
    return key


def _count(rows: Sequence[Any], field: str) -> Any:
    found: dict[str, int] = {}
    for one in rows:
        found[one[field]] = found.get(one[field], 0) + 1
    return found


def talk(number: int, exchanges: int = 2) -> list[tuple[str, str]]:
    """A conversation that no other number gives."""
    turns = []
    for i in range(exchanges):
        turns.append(
            ("user", f"I keep thinking about call {number}, for the {i}th night now, and I cannot sleep.")
        )
        turns.append(
            ("assistant", f"What is it about call {number} that comes back first, after {i} nights?")
        )
    return turns


def row(
    turns: Turns, *, split: str = "train", target: str = "assistant", stage: str = "stage1_foundation"
) -> Any:
    """A row of a shard as the build writes it."""
    messages = [{"role": role, "content": text} for role, text in turns]
    digest = "sha256:" + hashlib.sha256(json.dumps(list(turns)).encode()).hexdigest()
    if all(text.strip() for _, text in turns):
        digest = content_hash([Message.model_validate(message) for message in messages])
    metadata = {
        "source_family": "calls",
        "source_key": "calls.jsonl#1",
        "content_hash": digest,
        "pii_status": "none_detected",
        "license_tag": "cc0-1.0",
        "split": split,
        "stage": stage,
        "target_role": target,
        "provenance": {
            "original_s3_key": "calls.jsonl",
            "pipeline_version": "1",
            "processed_at": "2026-01-01T00:00:00Z",
            "steps": [],
        },
    }
    return {
        "content_hash": digest,
        "messages": messages,
        "source_family": "calls",
        "stage": stage,
        "target_role": target,
        "domain": None,
        "metadata": json.dumps(metadata),
    }


# --------------------------------------------------------------------------- the servers


def blocks_in(store: ObjectStore, corpus: str) -> int:
    """How many blocks of a corpus are tokenised."""
    keys = [info.key for info in store.list(f"final_dataset/{corpus}/tokens/")]
    return sum("/index-" not in key and "/packs-" not in key for key in keys)
