"""The whole way on one machine: bucket → corpus → training → release → hub → service → an answer.

    make quickstart

Every stage is a command, printed before it runs, that finds this script's store and hub in its environment. What is
done is kept in `.quickstart/` and `runs/quickstart/`: a second run reuses it, and one that was killed goes on where it
stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from training_ready import TrainingReadyError
from training_ready.release.hub_server import EmbeddedHub
from training_ready.serving.commands import ask_service
from training_ready.storage.embedded import EmbeddedStore, die_with_parent
from training_ready.storage.objects import ObjectStore

STATE, RUN = Path(".quickstart"), Path("runs/quickstart")
CONVERSATIONS = Path("src/training_ready/corpus/quickstart")
BUCKET, RECIPE = "quickstart", "recipes/quickstart.yaml"
RELEASE, REPOSITORY = STATE / "release", "training-ready/quickstart"
PROMPT = "I lie awake and go over every mistake I made at work. How do I make it stop?"

BIN = Path(sys.executable).parent
console = Console()
seconds: dict[str, float] = {}


def main() -> None:
    STATE.mkdir(exist_ok=True)
    with only_one(), EmbeddedStore(STATE / "store") as store, EmbeddedHub(STATE / "hub") as hub:
        ObjectStore(store.settings(BUCKET)).create_bucket_if_missing()
        environment = {
            **os.environ,
            **store.environment(),
            "OVH_S3_BUCKET": BUCKET,
            "HF_ENDPOINT": hub.endpoint_url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str((STATE / "huggingface").resolve()),
            "DS_ACCELERATOR": "cpu",  # an installed DeepSpeed warns that it finds no GPU
            "OMP_NUM_THREADS": str(os.cpu_count()),
            **({} if console.is_terminal else {"TQDM_DISABLE": "1"}),
        }
        # Servers on this machine are never asked for through a proxy, by the commands or by this process.
        environment["NO_PROXY"] = os.environ["NO_PROXY"] = (
            f"{os.environ.get('NO_PROXY', '')},127.0.0.1".strip(",")
        )
        console.print(
            f"An S3 store answers at {store.endpoint_url}, a hub at {hub.endpoint_url}. To type the commands yourself, "
            f"start both with `training-ready store serve {STATE}/store --bucket {BUCKET}` and "
            f"`training-ready hub serve --root {STATE}/hub`, which print the variables to export.",
            highlight=False,
        )

        # ------------------------------------------------------------ bucket
        with stage("upload"):
            run(environment, "training-ready", "data", "upload", str(CONVERSATIONS), "--to", "quickstart")

        # ------------------------------------------------------------ corpus
        with stage("corpus"):
            run(environment, "training-ready", "data", "build", str(CONVERSATIONS / "corpus.yaml"))

        # ---------------------------------------------------------- training
        with stage("training"):
            launch_file = "accelerate_configs/cpu.yaml"
            run(
                environment,
                "accelerate",
                "launch",
                "--config_file",
                launch_file,
                "scripts/run_sft.py",
                RECIPE,
            )

        # ----------------------------------------------------------- release
        with stage("release"):
            run(environment, "training-ready", "release", "build", str(RUN), str(RELEASE))
        with stage("push"):
            run(environment, "training-ready", "release", "publish", str(RELEASE), REPOSITORY)

        # ----------------------------------------------------------- service
        with stage("answer"), service(environment) as url:
            answer = ask_service(url, PROMPT, max_new_tokens=80)
        show(f"{url}/v1/chat/completions", answer)


@contextmanager
def only_one() -> Iterator[None]:
    """Two quickstarts in one folder would write over each other."""
    with (STATE / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingReadyError(
                "another quickstart is running in this folder: wait for it to end"
            ) from error
        yield


@contextmanager
def stage(name: str) -> Iterator[None]:
    console.print(Rule(name, align="left"))
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def run(environment: dict[str, str], *command: str) -> None:
    console.print(f"$ {' '.join(command)}", style="bold", highlight=False, soft_wrap=True)
    status = subprocess.run(
        [BIN / command[0], *command[1:]], env=environment, preexec_fn=die_with_parent
    ).returncode
    if status:
        raise TrainingReadyError(f"{command[0]} ended with status {status}; what was done before it is kept")


@contextmanager
def service(environment: dict[str, str]) -> Iterator[str]:
    """The released model, served from the hub on a free port; gives its address."""
    command = ["training-ready", "serve", REPOSITORY, "--port", "0"]
    console.print(f"$ {' '.join(command)}", style="bold", highlight=False)
    process = subprocess.Popen(
        [BIN / command[0], *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        yield _ready_address(process)
    finally:
        process.terminate()
        process.wait()


def _ready_address(process: subprocess.Popen[str]) -> str:
    for line in process.stdout or ():
        console.print(line.rstrip(), highlight=False, soft_wrap=True)
        if line.startswith("Ready: "):
            return line.removeprefix("Ready: ").strip()
    raise TrainingReadyError(f"the service ended with status {process.wait()} before it was ready")


def show(url: str, answer: str) -> None:
    """The one screen at the end; every figure is read from what the stages left behind."""
    facts = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    console.print(Rule("what happened"))
    console.print(records_table(facts["data"]), training_table(facts), expert_table(facts["moe"]))
    kept = Table.grid(padding=(0, 2))
    kept.add_row("checkpoint", facts["checkpoint"])
    kept.add_row("released model", f"{REPOSITORY} on the hub in {STATE}/hub; the same files in {RELEASE}")
    kept.add_row("pictures", ", ".join(str(RUN / picture) for picture in facts["pictures"]))
    kept.add_row("answered at", f"{url} (the service has stopped with this script)")
    kept.add_row("wall time", ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))
    console.print(kept, highlight=False)
    console.print(Panel(Text(PROMPT), title="prompt", title_align="left"))
    console.print(
        Panel(Text(answer.strip() or "(it ended its turn at once)"), title="answer", title_align="left")
    )
    console.print(
        f"{facts['model']['parameters_total'] / 1e6:.1f} million weights trained from nothing on "
        f"{facts['data']['splits']['train']} conversations can repeat their sound, not their sense: this shows that "
        "the way works, and nothing about therapy.",
    )
    console.print(f"Next: {BIN / 'training-ready'} serve {RELEASE}", highlight=False, soft_wrap=True)


def records_table(data: dict[str, Any]) -> Table:
    table = Table("source", "records in", "kept", "rejected", title="records", title_justify="left")
    for source in data["sources"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in source["rejected"].items())
        table.add_row(source["name"], str(source["records_in"]), str(source["kept"]), reasons)
    total_in = sum(source["records_in"] for source in data["sources"])
    total_kept = sum(source["kept"] for source in data["sources"])
    table.add_section()
    table.add_row("all", str(total_in), str(total_kept), str(total_in - total_kept))
    return table


def training_table(facts: dict[str, Any]) -> Table:
    tokens, loss = facts["tokens"], facts["loss"]
    table = Table(
        "steps", "tokens trained", "of them learned", "loss first → last", "evaluation", title="training"
    )
    table.title_justify = "left"
    table.add_row(
        str(facts["steps"]),
        f"{tokens['trained_tokens']:,}",
        f"{tokens['trained_learned_tokens']:,}",
        f"{loss['first']:.3f} → {loss['last']:.3f}",
        f"{loss['eval']:.3f}",
    )
    return table


def expert_table(moe: dict[str, Any]) -> Table:
    experts = len(moe["layers"][0]["load"])
    table = Table(
        "layer", *(f"expert {i}" for i in range(experts)), title="share of tokens", title_justify="left"
    )
    for layer in moe["layers"]:
        table.add_row(str(layer["layer"]), *(f"{share:.1%}" for share in layer["load"]))
    return table


if __name__ == "__main__":
    try:
        main()
    except TrainingReadyError as error:
        sys.exit(f"error: {error}\nRun `make quickstart` again: it goes on from here.")
