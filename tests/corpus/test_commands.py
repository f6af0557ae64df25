"""``data build`` as a person and as a program see it, and the corpus that ships with the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from training_ready.corpus.build import build_corpus
from training_ready.corpus.commands import data_build
from training_ready.corpus.manifest import Manifest
from training_ready.corpus.record import STAGES
from training_ready.corpus.spec import load_spec
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

QUICKSTART = Path(str(files("training_ready.corpus") / "quickstart"))


@pytest.fixture
def quickstart(store: ObjectStore) -> ObjectStore:
    for path in QUICKSTART.glob("*.jsonl"):
        store.put_bytes(f"quickstart/{path.name}", path.read_bytes())
    return store


def test_the_shipped_corpus_builds_and_every_stage_can_be_judged(quickstart: ObjectStore) -> None:
    manifest = build_corpus(load_spec(QUICKSTART / "corpus.yaml"), quickstart).manifest
    lines = sum(len(path.read_text().splitlines()) for path in QUICKSTART.glob("*.jsonl"))
    assert sum(source.records_in for source in manifest.sources) == lines
    assert manifest.records >= 60
    assert all(manifest.stages[stage] for stage in STAGES)
    assert min(manifest.splits.values()) >= 8
    *good, faulty = manifest.sources
    assert [source.rejected for source in good] == [{}] * 4
    assert all(source.splits[split] >= 2 for source in good for split in ("train", "val", "test"))
    assert not any(source.unused_fields for source in good)
    assert faulty.rejected == {"duplicate": 1, "empty": 1, "license_missing": 1, "license_not_allowed": 1}
    assert manifest.sources[2].crisis_rejected == 0


def test_a_person_reads_a_table_and_a_program_reads_json(
    quickstart: ObjectStore,
    store_server: EmbeddedStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in store_server.environment().items():
        monkeypatch.setenv(name, value)
    data_build(QUICKSTART / "corpus.yaml", bucket=quickstart.bucket)
    shown = capsys.readouterr()
    assert "quickstart_faulty_rows: rejected duplicate 1, empty 1, license_missing 1" in shown.out
    assert re.search(r"quickstart_foundation +24 +24 +0 +\d+ +\d+ +\d+ +Apache-2.0", shown.out)
    assert f"built: {quickstart.uri('final_dataset/quickstart/manifest.json')}" in shown.out
    assert shown.err == ""  # no bars where nobody watches
    data_build(QUICKSTART / "corpus.yaml", bucket=quickstart.bucket, as_json=True)
    read = json.loads(capsys.readouterr().out)
    manifest = Manifest.load(quickstart, read["manifest_uri"])
    assert read["reused"] is True
    assert read["manifest_sha256"] == manifest.sha256
    assert read["records"] == manifest.records
    data_build(QUICKSTART / "corpus.yaml", bucket=quickstart.bucket)
    assert "already built" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nam: x", "bad.yaml:1: nam: unknown key"),
        (
            (QUICKSTART / "corpus.yaml").read_text(),
            "stage1_foundation.jsonl (source 'quickstart_foundation')",
        ),
    ],
)
def test_bad_input_is_one_message_and_a_failure(
    store_server: EmbeddedStore, store: ObjectStore, tmp_path: Path, spec: str, message: str
) -> None:
    (tmp_path / "bad.yaml").write_text(spec)
    program = "import sys; from training_ready.cli import main; sys.argv[0] = 'training-ready'; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "data", "build", "bad.yaml", "--bucket", store.bucket],
        cwd=tmp_path,
        env={**os.environ, **store_server.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_corpus_room_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, training_ready.corpus.build, training_ready.corpus.commands\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=dict(os.environ))
