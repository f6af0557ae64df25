"""Conversations for benchmarks: seeded, of many lengths, in words that no language has. 200,000 are about 500 MB."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training_ready.corpus.manifest import Shard
from training_ready.corpus.shards import SHARD_SCHEMA, describe_shard

ROW_GROUP = 1000


def words(count: int = 3000, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    parts = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    return ["".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(count)]


def conversations(rows: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Two to sixteen turns; the number of words is log-normal, as of people who write."""
    draw, vocabulary = random.Random(seed), words(seed=seed)
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    pool = draw.choices(vocabulary, weights, k=1_000_000)
    for _ in range(rows):
        messages = []
        for turn in range(2 * draw.randint(1, 8)):
            length = max(3, min(600, int(draw.lognormvariate(3.4, 0.8))))
            start = draw.randrange(len(pool) - length)
            text = " ".join(pool[start : start + length])
            messages.append({"role": "assistant" if turn % 2 else "user", "content": text})
        yield messages


def write_corpus(folder: Path, rows: int, *, shards: int, seed: int) -> list[Shard]:
    """``part-N.jsonl`` and ``shard-N.parquet``, the same rows in both; the Parquet as a built corpus holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    source = conversations(rows, seed)
    for number in range(shards):
        count = rows // shards + (number < rows % shards)
        parquet = folder / f"shard-{number:05d}.parquet"
        with (
            (folder / f"part-{number:05d}.jsonl").open("wb") as lines,
            pq.ParquetWriter(parquet, SHARD_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
        ):
            for start in range(0, count, ROW_GROUP):
                some = [next(source) for _ in range(min(ROW_GROUP, count - start))]
                lines.writelines(json.dumps({"messages": one}).encode() + b"\n" for one in some)
                writer.write_table(pa.Table.from_pylist([_row(one) for one in some], schema=SHARD_SCHEMA))
        entries.append(describe_shard(parquet, f"final_dataset/synthetic/train/{parquet.name}", "train"))
    return entries


def write_array(path: Path, size: int, seed: int) -> int:
    """One JSON object ``{"conversations": […]}`` of at least ``size`` bytes; the number of its items."""
    items = 0
    block = [json.dumps({"messages": one}).encode() for one in conversations(2000, seed)]
    with path.open("wb") as output:
        output.write(b'{"made_by": "benchmarks/stream.py", "conversations": [')
        while output.tell() < size:
            output.write(b",\n".join(block) if not items else b",\n" + b",\n".join(block))
            items += len(block)
        output.write(b"]}")
    return items


def _row(messages: list[dict[str, str]]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    return {
        "content_hash": f"sha256:{digest}",
        "messages": messages,
        "source_family": "synthetic",
        "stage": "stage1_foundation",
        "target_role": "assistant",
        "domain": None,
        "metadata": "{}",
    }
