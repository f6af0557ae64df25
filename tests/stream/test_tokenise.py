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
from training_ready.stream import tokens
from training_ready.stream.assemble import Order, Part, pack_reader
from training_ready.stream.shards import StreamError
from training_ready.stream.tokens import Share, TokenCache

from ..corpora import blocks_in, put_corpus, put_shard
from .conftest import numbered_conversation

IN_A_RANK = """
import json, sys
from training_ready.corpus.manifest import Shard
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.stream import tokens
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.render import ChatRenderer
from training_ready.stream.tokens import Share, TokenCache
from transformers import PreTrainedTokenizerFast

if __name__ == "__main__":
    tokens._ROWS_PER_WORKER = 1
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
    store = ObjectStore(StorageSettings.from_environment(dotenv=False))
    renderer = ChatRenderer(tokenizer, "assistant")
    cache = TokenCache(store=store, corpus_prefix="final_dataset/numbers", renderer=renderer,
                       policy=LengthPolicy(max_length=128))
    cache.ensure([Shard(**shard) for shard in json.loads(sys.argv[2])], Share(workers=2))
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
    expected = {key: store.get_bytes(key) for key in alone.blocks}
    for info in list(store.list("final_dataset/numbers/tokens/")):
        store.delete(info.key)
    monkeypatch.setattr(tokens, "_ROWS_PER_WORKER", 1)
    seen: list[int] = []
    together = make_cache().ensure(shards, Share(workers=2, advance=seen.append))
    assert {key: store.get_bytes(key) for key in together.blocks} == expected
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


@pytest.mark.slow
def test_a_killed_process_stops_the_run_instead_of_hanging_it(
    store: ObjectStore, make_cache: Callable[..., TokenCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [numbered_conversation(row) for row in range(3000)]
    shard = put_shard(store, "numbers.parquet", rows, 50)
    monkeypatch.setattr(tokens, "_ROWS_PER_WORKER", 1)
    early = make_cache().begin("numbers", [shard], 3, Share(workers=2, ahead=True))
    children = Path(f"/proc/{os.getpid()}/task")
    spawned = [
        int(pid)
        for task in children.iterdir()
        for pid in (task / "children").read_text().split()
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(spawned) == 2
    os.kill(spawned[0], signal.SIGKILL)
    packs = pack_reader({"data": Part(tokens=early)}, Order(max_length=128, seed=3))
    with pytest.raises(StreamError, match="one of 2 tokenising processes was killed"):
        packs.plan.wait_for_all()
    with pytest.raises(StreamError, match="has failed before"):
        early.grow()
    found = blocks_in(store, "numbers")
    again = make_cache().ensure([shard])
    assert again.rows == 3000
    assert 2 <= found < 60  # what was finished is kept


@pytest.mark.slow
def test_a_signal_to_the_group_is_the_runs_affair(
    store: ObjectStore, store_server: EmbeddedStore, tokenizer: Any, tmp_path: Path
) -> None:
    """Ctrl-C reaches every process of a terminal; the tokenising ones go on until their run ends."""
    code = tmp_path / "early.py"
    code.write_text(
        "import os, signal, sys\n"
        "from training_ready.corpus.manifest import Manifest\n"
        "from training_ready.storage.objects import ObjectStore\n"
        "from training_ready.storage.settings import StorageSettings\n"
        "from training_ready.stream import tokens\n"
        "from training_ready.stream.lengths import LengthPolicy\n"
        "from training_ready.stream.render import ChatRenderer\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "if __name__ == '__main__':\n"
        "    tokens._ROWS_PER_WORKER = 1\n"
        "    signal.signal(signal.SIGINT, lambda *_: None)\n"  # as a run that finishes its step
        "    store = ObjectStore(StorageSettings.from_environment(dotenv=False))\n"
        "    renderer = ChatRenderer(PreTrainedTokenizerFast.from_pretrained(sys.argv[1]), 'assistant')\n"
        "    cache = tokens.TokenCache(store=store, corpus_prefix='final_dataset/numbers', renderer=renderer,\n"
        "                              policy=LengthPolicy(max_length=128))\n"
        "    shards = Manifest.load(store, 'final_dataset/numbers/manifest.json').shards_of('train')\n"
        "    early = cache.begin('numbers', shards, 3, tokens.Share(workers=2, ahead=True))\n"
        "    while len(early.rounds) < 4:\n"
        "        early.grow()\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    while not early.complete:\n"
        "        early.grow()\n"
        "    print(early.index.rows)\n"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    put_corpus(store, "numbers", {"train": [numbered_conversation(row) for row in range(2000)]}, 50)
    run = subprocess.run(
        [sys.executable, str(code), str(tmp_path / "tokenizer")],
        env={**os.environ, **store_server.environment(), "OVH_S3_BUCKET": store.bucket},
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert run.stdout.split()[-1:] == ["2000"], run.stderr[-2000:]
