"""The contenders of stream.py, each run alone in a process: ``python stream_contenders.py NAME JOB.json`` prints JSON.

Every contender imports first, and is measured from then on, so that imports cost nobody time or memory.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

CAPACITY = 2048


class Measure:
    """Times from its making on; memory above what was resident then."""

    def __init__(self) -> None:
        self._base, self._start = _resident(), time.monotonic()
        self._cpu = time.process_time()
        self.first: float | None = None
        self.packs = self.tokens = self.slots = 0

    def take(self, tokens: int, capacity: int) -> None:
        if self.first is None:
            self.first = self.elapsed()
        self.packs, self.tokens, self.slots = self.packs + 1, self.tokens + tokens, self.slots + capacity

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def result(self, rows: int, **more: Any) -> dict[str, Any]:
        seconds, cpu = self.elapsed(), time.process_time() - self._cpu
        # Not getrusage: its maximum survives exec, and would be that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "rows": rows,
            "rows_per_second": round(rows / seconds, 1),
            "rows_per_cpu_second": round(rows / max(cpu, 0.01), 1),
            "tokens_per_second": round(self.tokens / seconds),
            "packs": self.packs,
            "fill": round(self.tokens / self.slots, 4) if self.slots else None,
            "first_batch_seconds": None if self.first is None else round(self.first, 2),
            "peak_rss_over_imports_mb": round((peak - self._base) / 1e6),
            **more,
        }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bound(job: dict[str, Any]) -> dict[str, Any]:
    """Rows already in memory through the tokenizer, on one core: nobody can be faster without a cache."""
    from training_ready.stream.render import ChatRenderer

    rows = _jsonl(job, limit=4000)
    renderer = ChatRenderer(_tokenizer(job), "assistant")
    measure = Measure()
    for start in range(0, len(rows), 64):
        for one in renderer.render_many(rows[start : start + 64]):
            measure.take(len(one.input_ids), CAPACITY)
    return measure.result(len(rows))


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Every pack of a pass: tokenised as it is asked for (``early``), or from the tokens of a run before, counted."""
    import torch  # noqa: F401 - `datasets` imports it at the first row, and a trainer long before

    from training_ready.corpus.manifest import Shard
    from training_ready.stream.assemble import Order, Part, pack_reader
    from training_ready.stream.dataset import pack_stream
    from training_ready.stream.index import TokenIndex
    from training_ready.stream.lengths import LengthPolicy
    from training_ready.stream.render import ChatRenderer
    from training_ready.stream.token_set import TokenSet
    from training_ready.stream.tokens import Share, TokenCache

    store = _connected(job)
    tokenizer = _tokenizer(job)
    measure = Measure()
    cache = TokenCache(
        store=store,
        corpus_prefix="final_dataset/synthetic",
        renderer=ChatRenderer(tokenizer, "assistant"),
        policy=LengthPolicy(max_length=CAPACITY),
    )
    shards, share = [Shard(**shard) for shard in job["shards"]], Share(workers=job.get("workers", 1))
    if job.get("early"):
        tokens = cache.begin("synthetic", shards, 1, share)
    else:
        index = TokenIndex.joined([cache.ensure(shards, share)] * job.get("copies", 1))
        tokens = TokenSet(name="synthetic", store=store, prefix=cache.prefix, index=index)
    order = Order(
        max_length=CAPACITY, seed=1, lanes=job.get("lanes", 1), epochs=None if tokens.begins_early else 1
    )
    packs = pack_reader({"data": Part(tokens=tokens)}, order)
    plan, start = packs.plan, 0
    if "from_share" in job:
        start = int(plan.packs_per_pass * job["from_share"]) // order.lanes * order.lanes
    stream = pack_stream(packs, position=start, global_batch=order.lanes, fill_last_batch=False)
    for position, pack in enumerate(stream, start + 1):
        measure.take(len(pack["input_ids"]), CAPACITY)
        if "from_share" in job or (tokens.complete and position == plan.packs_per_pass):
            break
    rows = tokens.index.rows if "from_share" not in job else 0
    return measure.result(rows, reader=str(store.traffic.cost()))


def trl(job: dict[str, Any]) -> dict[str, Any]:
    """``datasets`` streaming with its shuffle buffer, and TRL's own preparation and packing, as in SFTTrainer."""
    import torch
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = _tokenizer(job)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    torch.set_num_threads(1)
    measure = Measure()
    data = load_dataset("json", data_files=job["http"], split="train", streaming=True).shuffle(
        1, buffer_size=1000
    )
    config = SFTConfig(
        output_dir=job["scratch"], max_length=CAPACITY, packing=True, max_steps=10**6, report_to=[], use_cpu=True,
        per_device_train_batch_size=1, bf16=False, eos_token=tokenizer.eos_token,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    at = []
    for batch in trainer.get_train_dataloader():
        measure.take(int(batch["input_ids"].numel()), CAPACITY)
        at.append(measure.elapsed())
    return measure.result(job["rows"], resume_at_90_seconds=round(at[int(len(at) * 0.9)], 2))


def litdata(job: dict[str, Any]) -> dict[str, Any]:
    """LitData's own chunks of the rows, shuffled, from the local disk (it refuses http:// endpoints)."""
    from litdata import StreamingDataset

    tokenizer = _tokenizer(job)
    measure = Measure()
    rows = StreamingDataset(job["litdata"], shuffle=True, seed=1)
    _pack_all((json.loads(row["text"])["messages"] for row in rows), tokenizer, measure)
    return measure.result(job["rows"])


def litdata_prepare(job: dict[str, Any]) -> dict[str, Any]:
    from litdata import optimize

    measure = Measure()
    optimize(fn=_lit_rows, inputs=job["jsonl"], output_dir=job["litdata"], chunk_bytes="64MB", num_workers=1)
    return measure.result(job["rows"])


def _lit_rows(path: str) -> Iterator[dict[str, str]]:
    with Path(path).open() as lines:
        for line in lines:
            yield {"text": line}


def mosaic(job: dict[str, Any]) -> dict[str, Any]:
    """MosaicML's own shards of the rows, shuffled, from the local disk."""
    from streaming import StreamingDataset

    tokenizer = _tokenizer(job)
    measure = Measure()
    rows = StreamingDataset(local=job["mosaic"], shuffle=True, shuffle_seed=1, batch_size=1)
    _pack_all((json.loads(row["text"])["messages"] for row in rows), tokenizer, measure)
    return measure.result(job["rows"])


def mosaic_prepare(job: dict[str, Any]) -> dict[str, Any]:
    from streaming import MDSWriter

    measure = Measure()
    with MDSWriter(out=job["mosaic"], columns={"text": "str"}, compression="zstd") as writer:
        for path in job["jsonl"]:
            with Path(path).open() as lines:
                for line in lines:
                    writer.write({"text": line})
    return measure.result(job["rows"])


def array(job: dict[str, Any]) -> dict[str, Any]:
    """One large JSON array, straight from the store."""
    from training_ready.corpus.raw import RawSource, iter_raw
    from training_ready.corpus.raw_objects import find_objects

    store = _connected(job)
    measure = Measure()
    source = RawSource(name="array", objects=find_objects(["raw/array.json"], store), form="messages")
    rows, middle = 0, None
    for position, _ in iter_raw(source):
        rows += 1
        measure.take(0, 0)
        if rows == job["items"] * 9 // 10:
            middle = position
    result = measure.result(rows, bytes=store.traffic.cost().bytes)
    again = time.monotonic()
    next(iter_raw(source, middle))
    return result | {"resume_at_90_seconds": round(time.monotonic() - again, 3)}


def bytes_alone(job: dict[str, Any]) -> dict[str, Any]:
    """Large objects in order, one after the other, nothing parsed."""
    store = _connected(job)
    measure, read = Measure(), 0
    for info in store.list("raw/large-"):
        with store.open(info.key, whole=True) as reader:
            while chunk := reader.read(1 << 20):
                read += len(chunk)
    result = measure.result(0)
    return result | {"mb_per_second": round(read / measure.elapsed() / 1e6, 1), "bytes": read}


def _pack_all(conversations: Iterable[Any], tokenizer: Any, measure: Measure) -> None:
    """What these peers leave to their user: the chat template, and best-fit packing over windows of 1,000 rows."""
    window: list[int] = []

    def flush() -> None:
        rooms: list[int] = []
        for length in sorted(window, reverse=True):
            fits = [number for number, room in enumerate(rooms) if room >= length]
            if fits:
                rooms[min(fits, key=lambda number: rooms[number])] -= length
            else:
                rooms.append(CAPACITY - length)
        for room in rooms:
            measure.take(CAPACITY - room, CAPACITY)
        window.clear()

    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        window.append(min(len(ids), CAPACITY))
        if len(window) == 1000:
            flush()
    flush()


def _connected(job: dict[str, Any]) -> Any:
    """The bucket, with a client that has been made: an import of a second, and no work of a stream."""
    from training_ready.storage.objects import ObjectStore

    store = ObjectStore(_settings(job))
    store.exists("warm")
    return store


def _settings(job: dict[str, Any]) -> Any:
    from training_ready.storage.settings import StorageSettings

    return StorageSettings.from_environment(job["environment"], dotenv=False, bucket=job["bucket"])


def _tokenizer(job: dict[str, Any]) -> Any:
    """From its parts: transformers 4, which MosaicML needs, cannot read the settings that transformers 5 has saved."""
    from transformers import PreTrainedTokenizerFast

    folder = Path(job["tokenizer"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=(folder / "chat_template.jinja").read_text(),
        **{name: settings[name] for name in ("eos_token", "pad_token")},
    )


def _jsonl(job: dict[str, Any], limit: int) -> list[Any]:
    with Path(job["jsonl"][0]).open() as lines:
        rows = [json.loads(line)["messages"] for line, _ in zip(lines, range(limit), strict=False)]
    random.Random(0).shuffle(rows)
    return rows


CONTENDERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    one.__name__: one
    for one in (bound, ours, trl, litdata, litdata_prepare, mosaic, mosaic_prepare, array, bytes_alone)
}

if __name__ == "__main__":
    print("RESULT " + json.dumps(CONTENDERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
