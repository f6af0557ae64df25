from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from training_ready.storage.embedded import EmbeddedStore, die_with_parent
from training_ready.storage.errors import StorageError
from training_ready.storage.objects import ObjectStore


def listening(url: str) -> bool:
    parts = urlsplit(url)
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(2)
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def gone(url: str, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while listening(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not listening(url)


def test_what_was_stored_survives_a_restart(tmp_path: Path) -> None:
    root = tmp_path / "buckets"
    with EmbeddedStore(root) as server:
        store = ObjectStore(server.settings("data"))
        store.create_bucket_if_missing()
        store.put_bytes("a/b.json", b"[1]")
        before, environment, url = store.head("a/b.json"), server.environment(), server.endpoint_url
    assert gone(url)
    assert (root / "data" / "a" / "b.json").read_bytes() == b"[1]"
    with EmbeddedStore(root) as server:
        store = ObjectStore(server.settings("data"))
        assert store.get_bytes("a/b.json") == b"[1]"
        assert store.head("a/b.json") == before
        same = {name for name, value in server.environment().items() if environment[name] == value}
        assert same >= {"OVH_S3_ACCESS_KEY", "OVH_S3_SECRET_KEY"}


def test_its_credentials_are_its_own_and_private(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "one") as one, EmbeddedStore(tmp_path / "two") as two:
        secret = one.environment()["OVH_S3_SECRET_KEY"]
        assert secret != two.environment()["OVH_S3_SECRET_KEY"]
        assert secret not in repr(one) + repr(one.settings())
        kept = tmp_path / "one.state" / "credentials.json"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
        assert one._process is not None
        command_line = Path(f"/proc/{one._process.pid}/cmdline")
        if command_line.exists():
            assert secret.encode() not in command_line.read_bytes()
        connection = http.client.HTTPConnection(urlsplit(one.endpoint_url).netloc)
        connection.request("GET", "/")  # without a signature
        answer = connection.getresponse()
        assert answer.status >= 400
        assert b"Bucket" not in answer.read()


def test_it_listens_on_loopback_at_the_port_asked_for(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with EmbeddedStore(tmp_path / "root", port) as server:
        assert server.endpoint_url == f"http://127.0.0.1:{port}"


def test_a_taken_port_is_an_error_with_the_servers_own_words(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StorageError, match=rf"(?s)address already in use.*Is port {port} taken"):
            EmbeddedStore(tmp_path / "root", port).start()
    with EmbeddedStore(tmp_path / "root"):  # the failed start holds nothing back
        pass


def test_one_server_per_folder(tmp_path: Path) -> None:
    with (
        EmbeddedStore(tmp_path / "root") as server,
        pytest.raises(StorageError, match="Another server already serves"),
    ):
        EmbeddedStore(server.root).start()


def test_not_started_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not started"):
        EmbeddedStore(tmp_path / "root").settings()


def test_damaged_credentials_are_not_replaced_in_silence(tmp_path: Path) -> None:
    (tmp_path / "root.state").mkdir()
    (tmp_path / "root.state" / "credentials.json").write_text("{")
    with pytest.raises(StorageError, match=r"credentials\.json is damaged"):
        EmbeddedStore(tmp_path / "root").start()


def test_a_rclone_setup_of_the_persons_own_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RCLONE_ADDR", "256.256.256.256:1")
    monkeypatch.setenv("RCLONE_CONFIG", str(tmp_path / "broken.conf"))
    (tmp_path / "broken.conf").write_text("[[[")
    with EmbeddedStore(tmp_path / "root") as server:
        assert listening(server.endpoint_url)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom training_ready.storage.embedded import EmbeddedStore\n"
        "server = EmbeddedStore(Path(sys.argv[1])).start()\nprint(server.endpoint_url, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "root"], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert listening(url)
        os.kill(parent.pid, how)
        parent.wait()
    assert gone(url)
    with EmbeddedStore(tmp_path / "root") as again:  # neither lock nor port is held
        assert listening(again.endpoint_url)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_die_with_parent_serves_any_child() -> None:
    code = (
        "import subprocess, sys, time\nfrom training_ready.storage.embedded import die_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(600)'],"
        " preexec_fn=die_with_parent)\ntime.sleep(600)\n"
    )
    assert die_with_parent.__module__ == "training_ready.storage.embedded"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"1\n"
        parent.kill()
        assert parent.stdout.read() == b""  # the pipe ends only when the grandchild is gone too
