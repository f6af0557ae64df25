from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from training_ready import TrainingReadyError
from training_ready.storage.commands import data_upload, data_verify, store_serve
from training_ready.storage.errors import StorageError
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.storage.upload import plan_uploads, upload_all
from training_ready.storage.verify import STEPS, verify_store


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    for command in (store_serve, data_verify, data_upload):
        app.command()(command)
    return app


def outcomes(settings: StorageSettings, prefix: str = "") -> dict[str, str]:
    return {step.name: step.outcome for step in verify_store(settings, prefix=prefix).steps}


def test_verify_proves_every_step_and_leaves_nothing(store: ObjectStore) -> None:
    result = verify_store(store.settings, prefix="scratch")
    assert [(step.name, step.outcome) for step in result.steps] == [(name, "proven") for name in STEPS]
    assert result.passed
    assert result.prefix == "scratch/"
    assert list(store.list()) == []


def test_verify_names_what_fails_and_does_not_try_the_rest(
    store: ObjectStore, store_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = ("write", "read", "range", "delete")
    nothing = outcomes(StorageSettings())
    assert nothing == {"settings": "failed", **dict.fromkeys(STEPS[1:], "not tried")}

    wrong = outcomes(
        StorageSettings(endpoint_url=store_server.endpoint_url, access_key_id="x", secret_access_key="y")
    )
    assert (wrong["endpoint"], wrong["credentials"], wrong["list"]) == ("proven", "failed", "not tried")

    absent = outcomes(store_server.settings("no-such-bucket"))
    assert (absent["credentials"], absent["list"]) == ("proven", "failed")
    assert {absent[name] for name in later} == {"not tried"}

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    dead = outcomes(
        StorageSettings(endpoint_url="http://127.0.0.1:1", access_key_id="x", secret_access_key="y")
    )
    assert (dead["settings"], dead["endpoint"], dead["credentials"]) == ("proven", "failed", "not tried")


def test_verify_finds_a_read_that_lies(proxied: ObjectStore, proxy: Any) -> None:
    proxy.always = "short"
    result = {step.name: step for step in verify_store(proxied.settings).steps}
    assert (result["write"].outcome, result["read"].outcome, result["range"].outcome) == (
        "proven",
        "failed",
        "failed",
    )
    assert "asked for" in result["read"].detail
    assert result["delete"].outcome == "proven"  # what it wrote it cleans up all the same


def test_the_verify_command(app: typer.Typer, store_environment: ObjectStore) -> None:
    good = CliRunner().invoke(app, ["data-verify", "--json"])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["passed"] is True
    table = CliRunner().invoke(app, ["data-verify"], env={"COLUMNS": "200"})
    assert table.stdout.count("proven") == len(STEPS)
    bad = CliRunner().invoke(app, ["data-verify", "--json", "--bucket", "no-such-bucket"])
    assert bad.exit_code == 1
    assert isinstance(bad.exception, TrainingReadyError)
    assert "list" in str(bad.exception)
    assert json.loads(bad.stdout)["passed"] is False
    secret = store_environment.settings.secret_access_key
    assert secret is not None
    assert secret not in good.output + table.output + bad.output


def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, data in {"a.json": "{}", "deep/b.json": "[]", ".env": "SECRET=1", ".git/config": "x"}.items():
        (folder / name).write_text(data)
    return folder


def test_upload_keeps_inner_paths_and_leaves_hidden_files_at_home(store: ObjectStore, tmp_path: Path) -> None:
    uploads, hidden = plan_uploads([tree(tmp_path)], "gdrive/raw/")
    assert [upload.key for upload in uploads] == ["gdrive/raw/a.json", "gdrive/raw/deep/b.json"]
    assert hidden == 2
    report = upload_all(store, uploads)
    assert (report.uploaded, report.identical, report.bytes_sent) == (2, 0, 4)
    assert store.get_bytes("gdrive/raw/deep/b.json") == b"[]"


def test_upload_sends_only_what_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    folder = tree(tmp_path)
    done: list[int] = []
    for changed, expected in ((None, (2, 0)), (None, (0, 2)), ("a.json", (1, 1))):
        if changed:
            (folder / changed).write_text("[]")  # of the same size
        report = upload_all(store, plan_uploads([folder], "x")[0], done.append)
        assert (report.uploaded, report.identical) == expected
    assert sum(done) == 12


def test_upload_skips_what_was_sent_in_parts(moto_store: ObjectStore, tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(os.urandom(17 << 20))
    uploads, _ = plan_uploads([big], "")
    assert [upload_all(moto_store, uploads).uploaded for _ in range(2)] == [1, 0]


def test_upload_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    folder = tree(tmp_path)
    (tmp_path / "a.json").write_text("other")
    with pytest.raises(StorageError, match="no such file"):
        plan_uploads([tmp_path / "none"], "x")
    with pytest.raises(StorageError, match=r"would both become x/a\.json"):
        plan_uploads([folder, tmp_path / "a.json"], "x")
    with pytest.raises(StorageError, match=r"Nothing to upload.*1 hidden"):
        plan_uploads([_only_hidden(tmp_path)], "x")
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="broken link"):
        plan_uploads([folder], "x")


def _only_hidden(tmp_path: Path) -> Path:
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / ".DS_Store").write_text("x")
    return folder


def test_the_upload_command(app: typer.Typer, store_environment: ObjectStore, tmp_path: Path) -> None:
    folder = str(tree(tmp_path))
    env = {"OVH_S3_ROOT_PREFIX": "datasets"}
    first = CliRunner().invoke(app, ["data-upload", folder, "--to", "gdrive/raw", "--json"], env=env)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["uploaded"] == 2
    again = CliRunner().invoke(app, ["data-upload", folder, "--to", "gdrive/raw"], env=env)
    assert "0 uploaded (0 bytes), 2 identical already, 2 hidden files left out" in again.stdout
    address = f"s3://{store_environment.bucket}/direct"
    CliRunner().invoke(app, ["data-upload", folder, "--to", address], env=env)
    assert {info.key for info in store_environment.list()} == {
        "datasets/gdrive/raw/a.json",
        "datasets/gdrive/raw/deep/b.json",
        "direct/a.json",
        "direct/deep/b.json",
    }


def test_every_help_has_an_example(app: typer.Typer) -> None:
    for name in ("store-serve", "data-verify", "data-upload"):
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert "Example: training-ready" in shown.output


def test_what_serve_prints_is_enough_to_use_it(tmp_path: Path) -> None:
    code = (
        "import sys, typer\nfrom training_ready.storage.commands import store_serve\n"
        "app = typer.Typer()\napp.command()(store_serve)\napp(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "root"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        lines = [serving.stdout.readline() for _ in range(5)]
        exported = dict(re.fullmatch(r"export (\w+)=(\S+)\n", line).groups() for line in lines)  # type: ignore[union-attr]
        settings = StorageSettings.from_environment(exported, dotenv=False)
        assert settings.bucket == "pixelated-training-data"
        assert verify_store(settings).passed
        serving.send_signal(signal.SIGINT)
        _, told = serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert "Stopped" in told
