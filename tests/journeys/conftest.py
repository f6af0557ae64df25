"""A machine of one's own: a bucket, a hub, and commands run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from training_ready.release.hub_server import EmbeddedHub
from training_ready.storage.embedded import EmbeddedStore, die_with_parent
from training_ready.storage.objects import ObjectStore

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def machine(
    store_server: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The environment of every command: an empty bucket and an empty hub on loopback."""
    folder = tmp_path_factory.mktemp("machine")
    bucket = f"journey-{os.getpid()}-{folder.name.replace('_', '-')}".lower()
    ObjectStore(store_server.settings(bucket)).create_bucket_if_missing()
    with EmbeddedHub(folder / "hub") as hub:
        yield {
            **os.environ,
            **store_server.environment(),
            **hub.environment(),
            "OVH_S3_BUCKET": bucket,
            "HF_HOME": str(folder / "huggingface"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "2",
        }


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def command(machine: dict[str, str]) -> Command:
    """Runs a command line in the repository; ``changes`` are environment variables."""

    def run(*words: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / words[0], *words[1:]],
            env={**machine, **changes},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=500,
        )

    return run


@pytest.fixture(scope="module")
def done(command: Command) -> Callable[..., str]:
    """Runs a command that must succeed, and returns what it printed."""

    def run(*words: str | Path) -> str:
        result = command(*words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def serving(machine: dict[str, str]) -> Callable[[str], AbstractContextManager[str]]:
    """The address of a service of a released model, while the context lasts."""

    @contextmanager
    def serve(model: str) -> Iterator[str]:
        process = subprocess.Popen(
            [BIN / "training-ready", "serve", model, "--port", "0"],
            env=machine,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        try:
            assert process.stdout is not None
            ready = next((line for line in process.stdout if line.startswith("Ready: ")), None)
            assert ready is not None, "the service ended before it was ready"
            yield ready.removeprefix("Ready: ").strip()
        finally:
            process.terminate()
            process.wait()

    return serve
