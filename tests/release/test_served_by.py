"""What `release verify` measured stands in the card and travels with the weights; what was not measured is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from training_ready.release.build import build_release
from training_ready.release.card import refresh_card
from training_ready.release.contents import EXPORT, ContentsError, release_files
from training_ready.release.export import ExportError
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.publish import publish_release
from training_ready.release.record import read_record
from training_ready.release.served_by import keep_report
from training_ready.release.targets.commands import release_export, release_verify

from .test_export import checkpoint_of, logits, release_words, tiny_model, tiny_tokenizer


@pytest.fixture
def built(run_folder: Callable[[], Path], tmp_path: Path) -> Path:
    run = run_folder()
    checkpoint_of(run, tiny_model(), tiny_tokenizer())
    build_release(run, tmp_path / "built", release_words())
    return tmp_path / "built"


def rows(folder: Path) -> dict[str, list[str]]:
    section = (folder / "README.md").read_text().partition("## Served by")[2].partition("## Files")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def test_an_export_is_verified_published_and_its_difference_stands_in_both_cards(
    hub: EmbeddedHub, built: Path, tmp_path: Path
) -> None:
    assert rows(built)["transformers 5"][:2] == ["not verified", "not measured"]
    export = tmp_path / "hf"
    release_export(built, export, "hf")
    with pytest.raises(ContentsError, match=r"it was not verified.*release verify"):
        publish_release(export, "me/tiny", endpoint=hub.endpoint_url)
    assert not HfApi(endpoint=hub.endpoint_url, token=False).repo_exists("me/tiny")
    release_verify(export, "hf", built)
    to_bucket = publish_release(export, str(tmp_path / "models"))
    publish_release(built, "me/tiny", endpoint=hub.endpoint_url)
    for folder in (export, built):
        verdict, difference, checks = rows(folder)["transformers 5"]
        assert (verdict, difference) == ("verified", "0.0e+00 (float32)")
        assert re.search(r"token ids: [\d,]+ ids", checks)
        assert rows(folder)["TGI 3.3.7, through transformers 4.51.0"][0] == "not verified"
    revision = tmp_path / "models" / to_bucket.name
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(revision).eval()), logits(tiny_model()))
    assert AutoTokenizer.from_pretrained(revision).chat_template == tiny_tokenizer().chat_template
    stray = export / "old" / "model.safetensors"
    stray.parent.mkdir()
    shutil.copy(next(export.glob("*.safetensors")), stray)
    with pytest.raises(
        ExportError, match=r"holds old/model\.safetensors, which `release export` did not write"
    ):
        release_verify(export, "hf", built)
    stray.unlink()
    weights = next(export.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ContentsError, match=f"{weights.name} changed since it was verified"):
        publish_release(export, str(tmp_path / "models"))
    of_others = ["not verified: the report is of other weights", "not measured"]
    save_file({"extra": torch.zeros(1)}, built / "extra.safetensors")
    refresh_card(built, read_record(built))
    assert rows(built)["transformers 5"][:2] == of_others
    (built / "extra.safetensors").unlink()
    refresh_card(built, read_record(built))
    assert rows(built)["transformers 5"][0] == "verified"
    config = json.loads((built / "config.json").read_bytes()) | {"rope_theta": 1.0}
    (built / "config.json").write_text(json.dumps(config))
    refresh_card(built, read_record(built))
    assert rows(built)["transformers 5"][:2] == of_others


@pytest.mark.parametrize("passed", [True, False])
def test_a_gguf_leaves_when_it_was_verified(
    hub: EmbeddedHub, release: Path, tmp_path: Path, passed: bool
) -> None:
    """The files and the report of an export for ollama; what is in the weights plays no part here."""
    export = tmp_path / "ollama"
    export.mkdir()
    for name in ("README.md", "release.json", "loss.png", "expert_load.png"):
        shutil.copy(release / name, export)
    (export / "model-f16.gguf").write_bytes(b"GGUF" + bytes(1000))
    (export / "Modelfile").write_text("FROM ./model-f16.gguf\n")
    marker = {"target": "ollama", "release": {}, "files": {"model-f16.gguf": 1004, "Modelfile": 22}}
    (export / EXPORT).write_text(json.dumps(marker))
    checks = [{"check": "logits", "result": "close", "passed": passed, "difference": 2e-5}]
    keep_report(export, release, target="ollama", dtype="float32", checks=checks)
    if not passed:
        with pytest.raises(ContentsError, match="it failed: logits"):
            publish_release(export, "me/gguf", endpoint=hub.endpoint_url)
        return
    publication = publish_release(export, "me/gguf", endpoint=hub.endpoint_url)
    assert {"model-f16.gguf", "Modelfile", "README.md"} <= {file.path for file in publication.files}
    assert rows(export)["ollama, through llama.cpp"][:2] == ["verified", "2.0e-05 (float32)"]
    (export / "LICENSE").write_text("Anybody may.")  # no engine reads it
    publish_release(export, "me/gguf", endpoint=hub.endpoint_url)
    (export / "adapter.gguf").write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(ContentsError, match=r"adapter\.gguf was not there when it was made"):
        publish_release(export, "me/gguf", endpoint=hub.endpoint_url)
    (export / "adapter.gguf").unlink()
    shutil.copy(export / "model-f16.gguf", release)
    with pytest.raises(ContentsError, match=r"model-f16\.gguf: not a kind of file"):
        release_files(release)


def test_a_measured_benchmark_becomes_an_entry_of_the_hub(
    summary: dict[str, Any], run_folder: Callable[[], Path], tmp_path: Path
) -> None:
    summary["evaluations"] = [
        {
            "dataset_id": "org/calm",
            "task_id": "default",
            "metric": "accuracy",
            "n": 412,
            "value": 0.375,
            "date": "2026-11-01T10:00:00Z",
            "protocol": "greedy, one sample",
        }
    ]
    run = run_folder()
    checkpoint_of(run, tiny_model(), tiny_tokenizer())
    folder = tmp_path / "built"
    build_release(run, folder, release_words())
    content = yaml.safe_load((folder / ".eval_results" / "org_calm.yaml").read_text())
    entry = parse_eval_result_entries(content)[0]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/calm", "default", 0.375)
    assert entry.notes == "accuracy, n = 412; greedy, one sample"
    text = (folder / "README.md").read_text()
    assert "| org/calm, default | accuracy | 412 | 0.375 | not evaluated | greedy, one sample |" in text
    assert ".eval_results/org_calm.yaml" in {file.path for file in release_files(folder)}
