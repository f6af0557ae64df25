"""`make quickstart` killed at any moment goes on, ends the same way, and a second run reuses what is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository as the script sees it, with a recipe of 12 steps."""
    for name in ("src", "scripts", "accelerate_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "recipes").mkdir()
    recipe = (REPOSITORY / "recipes/quickstart.yaml").read_text(encoding="utf-8")
    short = {"max_steps": 12, "save_steps": 4, "eval_steps": 6, "logging_steps": 1, "warmup_steps": 2}
    for key, value in short.items():
        recipe, changed = re.subn(rf"^{key}: \S+", f"{key}: {value}", recipe, flags=re.MULTILINE)
        assert changed == 1, key
    (tmp_path / "recipes/quickstart.yaml").write_text(recipe, encoding="utf-8")
    return tmp_path


def start(checkout: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "scripts/quickstart.py"],
        cwd=checkout,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(checkout: Path) -> str:
    process = start(checkout)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert "what happened" in out
    assert "answer" in out
    return out


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "cwd") == str(folder):
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended, or is somebody else's
    return found


def test_killed_at_four_moments_it_goes_on_to_the_same_end(checkout: Path) -> None:
    for moment in ("data build", "step 2/12", "step 9/12", "release publish"):
        process = start(checkout)
        assert process.stdout is not None
        for line in process.stdout:
            if moment in line:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 30
        while processes_in(checkout):  # its store, trainer and service go with it
            assert time.monotonic() < deadline, processes_in(checkout)
            time.sleep(0.1)
        process.stdout.close()

    finished(checkout)
    metrics = (checkout / "runs/quickstart/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics if "loss" in json.loads(line)] == list(range(1, 13))

    again = finished(checkout)
    assert "0 uploaded" in again
    assert "already built" in again
    assert "nothing to do" in again
    assert "already there" in again
