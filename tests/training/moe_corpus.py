"""Sixteen conversations of known length in a bucket, so that a batch holds the same tokens packed and padded."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from training_ready.corpus.build import build_corpus
from training_ready.corpus.spec import load_spec
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

CONVERSATIONS, HELD_OUT = 16, 2
SPEC = """
name: sixteen
seed: 1
splits: {train: 1.0, val: 0.0, test: 0.0}
allowed_licenses: [Apache-2.0]
sources:
  - name: sixteen
    path: sixteen/rows.jsonl
    stage: stage1_foundation
    license: Apache-2.0
    target_role: assistant
    domain: psychology
    language: en
    split_column: split
"""


def build_sixteen(server: EmbeddedStore, folder: Path) -> dict[str, str]:
    """Builds the corpus in a bucket of its own; returns the environment of a process that finds it."""
    bucket = f"sixteen-{uuid.uuid4().hex}"
    store = ObjectStore(server.settings(bucket))
    store.create_bucket_if_missing()
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row in map(_row, range(CONVERSATIONS + HELD_OUT))),
        encoding="utf-8",
    )
    store.put_file("sixteen/rows.jsonl", rows)
    spec = folder / "sixteen.yaml"
    spec.write_text(SPEC, encoding="utf-8")
    build_corpus(load_spec(spec), store)
    return {**server.environment(), "OVH_S3_BUCKET": bucket, "OMP_NUM_THREADS": "1"}


def _row(number: int) -> dict[str, object]:
    """Between 90 and 120 bytes of text each: two fit into a pack of 256 byte-level tokens, three do not."""
    question = f"Question {number}: " + "why do I wake at night? "[: 8 + number % 9]
    answer = f"Answer {number}: " + "what goes through your mind then, and what helps? " * 2
    return {
        "split": "train" if number < CONVERSATIONS else "val",
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer[: 75 + (number * 7) % 15]},
        ],
    }
