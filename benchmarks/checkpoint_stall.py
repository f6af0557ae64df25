"""What does a training step cost more while a checkpoint is uploaded, and how much memory does the upload take?

``python benchmarks/checkpoint_stall.py [--gib 2] [--rate 100e6] [--uploads 3]``: a checkpoint of one sparse file goes
to an embedded store by way of the mirror, again and again, over a network of ``--rate`` bytes per second, while
training steps of a small Llama are timed in the same process. Steps during an upload alternate with as many without.

``wall``: all that a step takes; store and network run on the same processors, which a real run does not share with
them, and other work weighs on it too. ``own``: the same without the time in which the training thread was ready to run
and no processor was free, as Linux counts it. ``blocked``: the part of that in which it did not run either, because
another thread of the process held the interpreter's lock (a mean: most steps wait for nothing, a few for long); the
rest is work, which takes longer when others empty the caches of its processor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from measure import machine, show, write
from slow_network import SlowNetwork
from transformers import LlamaConfig, LlamaForCausalLM

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.training.checkpoint_bucket import BucketCheckpoints
from training_ready.training.checkpoint_mirror import CheckpointMirror, MirrorPart

LIMIT = 0.02


def training_step() -> Callable[[], object]:
    """Forward, backward and AdamW of a small model on one thread, a few hundred milliseconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(512, (4, 256))

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
    return int(line.split()[1]) << 10


class PeakMemory:
    """The largest resident size of this process while it is open, beyond the one at its beginning."""

    def __enter__(self) -> PeakMemory:
        self._before, self.bytes, self._closed = resident_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(0.2):
            self.bytes = max(self.bytes, resident_bytes() - self._before)


def checkpoint(run: Path, step: int, size: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(step.to_bytes(8, "big"))
        file.truncate(size)
    (folder / "stream_state.json").write_text("{}", encoding="utf-8")
    return folder


def timed(step: Callable[[], object], go_on: Callable[[int], bool]) -> dict[str, float]:
    """Number of steps that are made as long as ``go_on`` says so of it; medians of their seconds, mean of blocked."""
    wall, own, blocked = [], [], []
    while go_on(len(wall)):
        began, worked, waited = time.perf_counter(), time.thread_time(), waiting_for_a_processor()
        step()
        wall.append(time.perf_counter() - began)
        own.append(wall[-1] - (waiting_for_a_processor() - waited))
        blocked.append(own[-1] - (time.thread_time() - worked))
    medians = {"wall": statistics.median(wall), "own": statistics.median(own)}
    return {"steps": len(wall), **medians, "blocked": statistics.fmean(blocked)}


def waiting_for_a_processor() -> float:
    """Seconds that this thread has been ready to run without running."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def measure(store: ObjectStore, run: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    step, rows = training_step(), []
    timed(step, lambda done: done < 5)
    bucket = BucketCheckpoints(store, "runs/stall/", "stall")
    for number in range(1, options.uploads + 1):
        folder = checkpoint(run, number, int(options.gib * (1 << 30)))
        with CheckpointMirror(bucket, MirrorPart(attempt="stall"), keep=1) as mirror, PeakMemory() as peak:
            mirror.add(folder)
            began = time.perf_counter()
            during = timed(step, lambda _, mirror=mirror: bool(mirror.pending))
            seconds = time.perf_counter() - began
            alone = timed(step, lambda done, count=during["steps"]: done < count)
        rows.append(
            {
                "upload_gib": options.gib,
                "upload_s": seconds,
                "steps": during["steps"],
                "wall_during_s": during["wall"],
                "wall_alone_s": alone["wall"],
                "wall_cost": during["wall"] / alone["wall"] - 1,
                "own_during_s": during["own"],
                "own_alone_s": alone["own"],
                "own_cost": during["own"] / alone["own"] - 1,
                "blocked_during_s": during["blocked"],
                "blocked_alone_s": alone["blocked"],
                "blocked_cost": (during["blocked"] - alone["blocked"]) / alone["own"],
                "peak_memory_mib": peak.bytes / (1 << 20),
            }
        )
        show(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=100e6, help="bytes per second of the network")
    parser.add_argument("--uploads", type=int, default=3)
    parser.add_argument("--note")
    options = parser.parse_args()
    facts = machine(options.note) | {"rate": options.rate}
    with tempfile.TemporaryDirectory() as place, EmbeddedStore(Path(place) / "buckets") as server:
        settings = server.settings("stall")
        ObjectStore(settings).create_bucket_if_missing()
        with SlowNetwork(
            urlsplit(server.endpoint_url).netloc, rate=options.rate / 4
        ) as network:  # four connections
            store = ObjectStore(replace(settings, endpoint_url=network.url))
            rows = measure(store, Path(place) / "run", options)
    for name in ("wall", "own", "blocked"):
        cost = statistics.median(row[f"{name}_cost"] for row in rows)
        print(f"a step during an upload costs {cost:+.1%} {name} time (the goal is at most {LIMIT:.0%})")
    write("checkpoint-stall", rows, facts)


if __name__ == "__main__":
    main()
