"""The two commands as a person runs them: in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from training_ready.release.hub_server import EmbeddedHub
from training_ready.serving.commands import ask_service
from training_ready.serving.errors import ServingError

RUN = "from training_ready.cli import main; main()"


def command(name: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, name, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[str]:
    """A started service; gives its URL, and checks that it ends cleanly when told to."""
    process = command("serve", *arguments, "--port", "0", **environment)
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ready: "):
                yield line.removeprefix("Ready: ").strip()
                break
        else:
            pytest.fail("".join(lines) + process.communicate(timeout=60)[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    noise = process.communicate()[1]
    assert "Traceback" not in noise
    assert "Loading weights" not in noise, "no progress bar where there is no terminal"


def test_serve_then_ask(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(str(release), "--device", "cpu", TRAINING_READY_API_KEY="sesame") as url:
        assert url.startswith("http://127.0.0.1:")
        assert httpx2.get(url + "/info").json()["model_id"] == str(release)
        with pytest.raises(ServingError, match="401"):
            ask_service(url, "Count")
        monkeypatch.setenv("TRAINING_READY_API_KEY", "sesame")
        assert ask_service(url, "Count") == "one two three four five six seven eight nine ten"
        assert ask_service(url, "Count", max_new_tokens=3) == "one t"
        with pytest.raises(ServingError, match="4000 `max_new_tokens`"):
            ask_service(url, "Count", max_new_tokens=4000)
        asking = command("ask", url, "Hello", TRAINING_READY_API_KEY="sesame")
        out, err = asking.communicate(timeout=60)
        assert (asking.returncode, out.strip()) == (0, "Good to see you. How was your week?"), err


def test_serve_from_a_hub_by_revision(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With Xet on, huggingface_hub has no other way to upload weights; the variable is read at import.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with EmbeddedHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint_url, token="none")
        api.create_repo("people/tiny")
        files = [CommitOperationAdd(path.name, path) for path in sorted(release.iterdir())]
        files.append(CommitOperationAdd("evil.py", b"raise SystemExit('not even downloaded')"))
        first = api.create_commit("people/tiny", files, commit_message="release").oid
        api.create_tag("people/tiny", tag="v1", revision=first)
        api.create_commit("people/tiny", [CommitOperationAdd("note.txt", b"later")], commit_message="later")
        cache = tmp_path / "cache"
        environment = hub.environment() | {"HF_HOME": str(cache)}
        with running("people/tiny", "--revision", "v1", **environment) as url:
            info = httpx2.get(url + "/info").json()
            assert (info["model_id"], info["model_sha"]) == ("people/tiny", first)
            assert ask_service(url, "Hello") == "Good to see you. How was your week?"
        assert list(cache.rglob("model.safetensors"))
        assert not list(cache.rglob("evil.py"))
        missing = command("serve", "people/tiny", "--revision", "v2", "--port", "0", **environment)
        _, err = missing.communicate(timeout=60)
        assert "people/tiny at revision v2: neither a local folder nor readable from the hub" in err
        assert "Traceback" not in err


def test_a_hub_that_is_down_is_one_message() -> None:
    process = command("serve", "people/tiny", "--port", "0", HF_ENDPOINT="http://127.0.0.1:9")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Check the name, HF_ENDPOINT" in err
    assert "Traceback" not in err
    assert "Ready" not in out


def test_asking_where_nobody_answers() -> None:
    with pytest.raises(ServingError, match="training-ready serve"):
        ask_service("http://127.0.0.1:9", "Hello")


def test_the_machines_hub_token_is_not_sent_to_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    seen = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers["authorization"])
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.delenv("TRAINING_READY_API_KEY", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ServingError):
            ask_service(f"http://127.0.0.1:{server.server_address[1]}", "Hello")
        server.shutdown()
    assert seen == ["Bearer none"]


def test_serve_refuses_before_it_loads(tmp_path: Path) -> None:
    environment = {"TRAINING_READY_API_KEY": ""}
    process = command("serve", str(tmp_path / "nowhere"), "--host", "0.0.0.0", "--port", "0", **environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "TRAINING_READY_API_KEY" in err
