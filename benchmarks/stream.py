"""How fast do tokens come out of a bucket? Ours beside other streams, on the same rows, in one run.

    python benchmarks/stream.py                               # 200,000 conversations, about 500 MB; an hour on 2 cores
    python benchmarks/stream.py --rows 20000                  # minutes
    python benchmarks/stream.py --array-gb 10                 # one JSON array of that size, and nothing else
    python benchmarks/stream.py --corpus-gb 20                # a corpus of that size, and nothing else; see `large`

Everything is made here, seeded: conversations, tokenizer, an S3 server on loopback and a network that counts bytes.
Each contender runs alone in a process of its own. Other streams are run where their Python is given: --trl PYTHON (this
package's environment and aiohttp, requests), --litdata PYTHON, --mosaic PYTHON; else they are listed as not run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slow_network import SlowNetwork
from synthetic import conversations, write_array, write_corpus

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "trl", "datasets", "pyarrow", "boto3", "tokenizers")


class Bench:
    """One bucket with the data in it, and the way to run a contender against it."""

    def __init__(self, folder: Path, server: EmbeddedStore) -> None:
        self.folder, self.server = folder, server
        self.store = ObjectStore(server.settings("bench"))
        self.store.create_bucket_if_missing()
        self.job: dict[str, Any] = {"bucket": "bench", "scratch": str(folder / "scratch")}

    def fill(self, rows: int, shards: int) -> None:
        from training_ready.training.tokenizer import train_tokenizer

        entries = write_corpus(self.folder / "data", rows, shards=shards, seed=1)
        for entry in entries:
            self.store.put_file(entry.key, self.folder / "data" / Path(entry.key).name)
        lines = sorted((self.folder / "data").glob("*.jsonl"))
        for path in lines:
            self.store.put_file(f"raw/{path.name}", path)
        large = self.folder / "large"
        with large.open("wb") as output:
            for _ in range(64):
                output.write(os.urandom(1 << 20))
        for number in range(4):
            self.store.put_file(f"raw/large-{number}", large)
        texts = (message["content"] for one in conversations(2000, seed=1) for message in one)
        train_tokenizer(texts, vocab_size=8000).save_pretrained(self.folder / "tokenizer")
        self.job |= {
            "rows": rows,
            "shards": [entry.model_dump() for entry in entries],
            "jsonl": [str(path) for path in lines],
            "tokenizer": str(self.folder / "tokenizer"),
            "litdata": str(self.folder / "litdata"),
            "mosaic": str(self.folder / "mosaic"),
            "jsonl_bytes": sum(path.stat().st_size for path in lines),
            "parquet_bytes": sum(entry.bytes for entry in entries),
        }

    def run(self, name: str, *, python: str = sys.executable, **more: Any) -> dict[str, Any]:
        """The measures of one contender, and the bytes that came over the network; or why there are none."""
        slow = {key: more.pop(key) for key in ("latency", "rate") if key in more}
        http, port = _serve_http(self.server.root)
        with (
            SlowNetwork(urlsplit(self.server.endpoint_url).netloc, **slow) as s3,
            SlowNetwork(f"127.0.0.1:{port}") as web,
        ):
            environment = {**self.server.environment(), "OVH_S3_ENDPOINT": s3.url}
            urls = [f"{web.url}/bench/raw/{Path(path).name}" for path in self.job.get("jsonl", ())]
            job = self.folder / "job.json"
            job.write_text(json.dumps({**self.job, **more, "environment": environment, "http": urls}))
            print(f"{name} {more or ''}", file=sys.stderr, flush=True)
            done = subprocess.run(
                [python, str(HERE / "stream_contenders.py"), name, str(job)],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    "HF_HUB_OFFLINE": "1",
                },
                cwd=self.folder,
                capture_output=True,
                text=True,
            )
            counted = s3.counts()["bytes"] + web.counts()["bytes"]
        http.kill()
        http.wait()
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            return {"failed": (done.stderr or done.stdout).strip().splitlines()[-1:]}
        result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
        return result | {"network_bytes": counted}


def _serve_http(root: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The same folder over plain HTTP: without s3fs, which asks for an older boto3, `datasets` reads no S3."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    command = [rclone, "serve", "http", str(root), "--addr", f"127.0.0.1:{port}", "--config", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    return process, port


def streams(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Every contender, one after the other."""
    results = {
        "tokenising alone, 1 core": bench.run("bound"),
        "ours, first run": bench.run("ours", early=True),
        "ours, from the token cache": bench.run("ours"),
        "ours, resumed at 90 %": bench.run("ours", from_share=0.9),
        "datasets + TRL": _not_run("trl") if options.trl is None else bench.run("trl", python=options.trl),
        "ours, 4 x 64 MiB at 30 ms and 80 MB/s": bench.run("bytes_alone", latency=0.03, rate=80e6),
    }
    for name, python in (("litdata", options.litdata), ("mosaic", options.mosaic)):
        if python is None:
            results[name] = _not_run(name)
            continue
        results[f"{name}, its own conversion"] = bench.run(f"{name}_prepare", python=python)
        results[name] = bench.run(name, python=python)
    return results


def large(bench: Bench, gigabytes: float) -> dict[str, Any]:
    """One rank reads all packs of a large corpus, 16 lanes at once.

    It is made of the tokens of 20,000 conversations, listed as often as their JSON lines go into that size: plan,
    order, requests, decoding and packing are those of the whole; disk and tokenising are spared.
    """
    copies = math.ceil(gigabytes * 1e9 / bench.job["jsonl_bytes"])
    return {
        "first run, of the tokens that are listed": bench.run("ours"),
        f"all packs, the tokens listed {copies} times, nothing tokenised": bench.run(
            "ours", copies=copies, lanes=16
        ),
    }


def _not_run(name: str) -> dict[str, Any]:
    return {"not run": f"no Python given (--{name})"}


def verdicts(results: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """What was wanted, and what came of it."""
    bound, first = results["tokenising alone, 1 core"], results["ours, first run"]
    again, trl = results["ours, from the token cache"], results["datasets + TRL"]
    resumed, slow = results["ours, resumed at 90 %"], results["ours, 4 x 64 MiB at 30 ms and 80 MB/s"]
    speed, per_cpu = "tokens_per_second", "rows_per_cpu_second"
    return {
        "first run / tokenising bound of 1 core (rows/s)": _ratio(first, bound, "rows_per_second"),
        "first run / tokenising bound (rows per CPU second)": _ratio(first, bound, per_cpu),
        "first run / datasets + TRL (rows per CPU second)": _ratio(first, trl, per_cpu),
        "token cache / datasets + TRL (rows per CPU second)": _ratio(again, trl, per_cpu),
        "first run / datasets + TRL (tokens/s; wanted 1.5)": _ratio(first, trl, speed),
        "token cache / datasets + TRL (tokens/s; wanted 10)": _ratio(again, trl, speed),
        "first run: bytes / (corpus + its tokens, read back)": round(
            first["network_bytes"] / (job["parquet_bytes"] + job["token_bytes"]), 3
        ),
        "token cache: bytes / bytes of the tokens": round(again["network_bytes"] / job["token_bytes"], 3),
        "datasets + TRL: bytes / bytes of the corpus": round(
            trl.get("network_bytes", 0) / job["jsonl_bytes"], 3
        ),
        "token cache: first batch, seconds (wanted < 2)": again.get("first_batch_seconds"),
        "first run: first batch, seconds (wanted < 2)": first.get("first_batch_seconds"),
        "resumed at 90 %: first batch, seconds (wanted <= 1)": resumed.get("first_batch_seconds"),
        "RSS over imports, MB (wanted <= 150)": [
            one.get("peak_rss_over_imports_mb") for one in (first, again, resumed)
        ],
        "30 ms and 80 MB/s a connection, MB/s (wanted >= 150)": slow.get("mb_per_second"),
    }


def _ratio(one: dict[str, Any], other: dict[str, Any], name: str) -> float | str:
    return round(one[name] / other[name], 2) if name in one and name in other else "not measured"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--array-gb", type=float, help="only: stream one JSON array of this size")
    parser.add_argument(
        "--corpus-gb", type=float, help="only: stream a corpus whose JSON lines had this size"
    )
    parser.add_argument(
        "--trl", metavar="PYTHON", help="an interpreter that has this package, aiohttp and requests"
    )
    parser.add_argument("--litdata", metavar="PYTHON", help="an interpreter that has litdata")
    parser.add_argument("--mosaic", metavar="PYTHON", help="an interpreter that has mosaicml-streaming")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, {platform.platform()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "rows": options.rows,
    }
    with tempfile.TemporaryDirectory() as folder, EmbeddedStore(Path(folder) / "buckets") as server:
        bench = Bench(Path(folder), server)
        if options.array_gb:
            path = Path(folder) / "array.json"
            bench.job["items"] = write_array(path, int(options.array_gb * 1e9), seed=2)
            bench.store.put_file("raw/array.json", path)
            report |= {"array_bytes": path.stat().st_size, "results": {"JSON array": bench.run("array")}}
        elif options.corpus_gb:
            bench.fill(20_000, options.shards)
            report |= {"corpus_gb": options.corpus_gb, "results": large(bench, options.corpus_gb)}
        else:
            bench.fill(options.rows, options.shards)
            report["results"] = streams(bench, options)
            tokens = bench.store.list("final_dataset/synthetic/tokens/")
            bench.job["token_bytes"] = sum(one.size for one in tokens if "/index-" not in one.key)
            report |= {name: bench.job[name] for name in ("jsonl_bytes", "parquet_bytes", "token_bytes")}
            report["verdicts"] = verdicts(report["results"], bench.job)
    report["load_at_the_end"] = round(os.getloadavg()[0], 1)
    options.out.mkdir(parents=True, exist_ok=True)
    kind, size = next(
        (kind, size)
        for kind, size in (
            ("array", options.array_gb),
            ("corpus", options.corpus_gb),
            ("stream", options.rows),
        )
        if size
    )
    out = options.out / f"{kind}-{report['date']}-{size}.json"
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
