"""Training processes that start in a moment: one process imports everything, and forks for every run.

Its standard input has one job per line; it answers with the process id of the run, and with its exit status when it
has ended. A run that is given a stage kills itself there, as ``kill -9`` does. Stages are what Python's own audit
events show of the world outside, so nothing in the tested code knows of them:

* "files": a file or folder of a checkpoint is about to be opened, made, renamed or removed by the main thread;
* "requests": a thread of the mirror is about to send a request about a step to the bucket.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from training_ready.storage.embedded import die_with_parent

_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
_OF_A_CHECKPOINT = re.compile(r"/\.?checkpoint-\d+(?:\.download)?(?:/|$)")
_OF_A_STEP = re.compile(rb"[A-Z]+ \S*step-\d+/\S*")


class ForkedRuns:
    """The process that forks. Use as a context manager; one run at a time."""

    _running: int | None = None

    def __enter__(self) -> ForkedRuns:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # and with it, by `die_with_parent`, a run that a failed test has left
        self._process.communicate()

    def start(
        self, log: Path, *arguments: object, stage: tuple[str, int] | None = None, **environment: str
    ) -> int:
        """Start a run in the folder of ``log``, which gets its output; its process id."""
        job = {
            "arguments": [str(argument) for argument in arguments],
            "environment": environment,
            "log": str(log),
            "stage": stage,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._running = self._answer()
        return self._running

    def wait(self) -> int:
        """The exit status of the run; negative for a signal."""
        status, self._running = self._answer(), None
        return status

    def stop(self) -> None:
        """End the run that a failed test has left behind."""
        if self._running is not None:
            with suppress(ProcessLookupError):
                os.kill(self._running, signal.SIGKILL)
            self.wait()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def die_at(kind: str, wanted: int, told: Path) -> None:
    """Kill this process when it reaches a stage of this kind for the time ``wanted``; ``told`` gets a line for each."""
    find = {"files": _file, "requests": _request}[kind]
    file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    count, before = 0, ""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, before
        stage = find(event, arguments)
        if stage is None or stage == before:
            return
        before = stage
        os.write(file, f"{count} {stage}\n".encode())
        if count == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    sys.addaudithook(hook)


def _file(event: str, arguments: tuple[Any, ...]) -> str | None:
    if event not in _FILE_EVENTS or threading.current_thread() is not threading.main_thread():
        return None
    path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
    return f"{event} {path}" if _OF_A_CHECKPOINT.search(path) else None


def _request(event: str, arguments: tuple[Any, ...]) -> str | None:
    if event != "http.client.send" or threading.current_thread() is threading.main_thread():
        return None
    found = _OF_A_STEP.match(bytes(arguments[1])) if isinstance(arguments[1], (bytes, bytearray)) else None
    return found[0].decode() if found else None


def main() -> None:
    import training_ready.training.run  # noqa: F401  (what takes seconds)
    from training_ready.training.main import main as train

    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(train, job)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(train: Any, job: dict[str, Any]) -> None:
    status, log = 1, Path(job["log"])
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(log.parent)
    os.environ.update(job["environment"])
    if job["stage"] is not None:
        die_at(*job["stage"], log.with_suffix(".stages"))
    try:
        status = train(job["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
