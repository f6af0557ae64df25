"""Tokenising in several processes: the same tokens, and none of the processes outlives its rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.stream import tokenise
from training_ready.stream.tokens import TokenCache

from .conftest import numbered_conversation, put_shard

IN_A_RANK = """
import json, sys
from training_ready.corpus.manifest import Shard
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.stream import tokenise
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.render import ChatRenderer
from training_ready.stream.tokens import TokenCache
from transformers import PreTrainedTokenizerFast

if __name__ == "__main__":
    tokenise._ROWS_PER_WORKER = 1
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
    store = ObjectStore(StorageSettings.from_environment(dotenv=False))
    renderer = ChatRenderer(tokenizer, "assistant")
    cache = TokenCache(store=store, corpus_prefix="final_dataset/numbers", renderer=renderer,
                       policy=LengthPolicy(max_length=128))
    cache.ensure([Shard(**shard) for shard in json.loads(sys.argv[2])], workers=2)
"""


@pytest.mark.slow
def test_two_processes_make_the_tokens_of_one(
    store: ObjectStore, make_cache: Callable[..., TokenCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [
        put_shard(store, f"{n}.parquet", [numbered_conversation(row) for row in range(n * 10, n * 10 + 10)])
        for n in range(4)
    ]
    alone = make_cache().ensure(shards)
    expected = {key: store.get_bytes(key) for key in alone.shards}
    for info in list(store.list("final_dataset/numbers/tokens/")):
        store.delete(info.key)
    monkeypatch.setattr(tokenise, "_ROWS_PER_WORKER", 1)
    seen: list[int] = []
    together = make_cache().ensure(shards, workers=2, advance=seen.append)
    assert {key: store.get_bytes(key) for key in together.shards} == expected
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert seen == [10] * 4


@pytest.mark.slow
def test_no_process_outlives_a_killed_rank(
    store: ObjectStore, store_server: EmbeddedStore, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [numbered_conversation(row) for row in range(4000)]
    shards = [put_shard(store, f"{n}.parquet", [*rows, numbered_conversation(n)]) for n in range(4)]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "rank.py"
    script.write_text(IN_A_RANK)
    listed = json.dumps([shard.model_dump() for shard in shards])
    environment = {**os.environ, **store_server.environment(), "OVH_S3_BUCKET": store.bucket}
    rank = subprocess.Popen([sys.executable, script, tmp_path / "tokenizer", listed], env=environment)

    def workers() -> list[int]:
        children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    while not list(store.list("final_dataset/numbers/tokens/")):  # one is done: both are at work
        assert rank.poll() is None
        time.sleep(0.05)
    found = workers()
    assert len(found) == 2
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    deadline = time.monotonic() + 30
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found
    ):
        assert time.monotonic() < deadline, f"{found} outlived their rank"
        time.sleep(0.05)
