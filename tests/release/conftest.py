"""A hub of one's own, its client, and a release small enough to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi
from safetensors.numpy import save_file

from training_ready.release.card import refresh_card
from training_ready.release.connection import without_xet
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.record import read_record
from training_ready.storage.objects import ObjectStore


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[EmbeddedHub]:
    with EmbeddedHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def api(hub: EmbeddedHub) -> Iterator[HfApi]:
    """The real client; it never uses a login of this machine."""
    with without_xet(hub.endpoint_url):
        yield HfApi(endpoint=hub.endpoint_url, token=False)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Files of a release whose weights are two arrays: nothing here needs a model that runs."""
    return make_release(tmp_path / "release")


def make_release(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(seed).normal(size=(64, 500)).astype(np.float32)
    save_file({"embed.weight": weights, "head.weight": weights[::-1].copy()}, folder / "model.safetensors")
    for name, content in {
        "config.json": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        "generation_config.json": {"eos_token_id": [2], "pad_token_id": 1},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}},
        "tokenizer.json": {"added_tokens": [{"id": 2, "content": "<|im_end|>"}], "model": {"vocab": {}}},
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    for picture in ("loss.png", "expert_load.png"):
        (folder / picture).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100) + picture.encode())
    record = {
        "title": "tiny",
        "facts": make_summary(),
        "words": make_words(),
        "chat_template": "{{ messages[0].content }}<|im_end|>",
        "end_of_turn": {"2": "<|im_end|>"},
        "special_tokens": {"eos_token": "<|im_end|>"},
    }
    (folder / "release.json").write_text(json.dumps(record))
    refresh_card(folder, read_record(folder))
    return folder


def of_another(release: Path, **facts: object) -> Path:
    """The same files as the release of another run or base model."""
    record = json.loads((release / "release.json").read_bytes())
    record["facts"] |= {key: value for key, value in facts.items() if key != "base_model"}
    if "base_model" in facts:
        record["facts"]["model"]["base_model"] = facts["base_model"]
    (release / "release.json").write_text(json.dumps(record))
    return release


def make_words() -> dict[str, Any]:
    return {
        "license": "apache-2.0",
        "language": ["en", "fr"],
        "tags": ["calm"],
        "summary": "A tiny model for a test.",
        "intended_use": "Trying the journey.",
        "limits": "It knows nothing.",
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    """A summary as training writes it, with numbers that occur nowhere else."""
    return make_summary()


def make_summary() -> dict[str, Any]:
    return {
        "run": "tiny-run",
        "started_at": "2026-11-01T10:00:00+00:00",
        "finished_at": "2026-11-01T11:02:00+00:00",
        "wall_seconds": 3720.0,
        "steps": 4321,
        "seed": 17,
        "recipe": {
            "path": "recipes/tiny.yaml",
            "sha256": "a" * 64,
            "resolved": 'learning_rate: 0.00123\nnote: "```"\n',
        },
        "data": {
            "corpus": "tiny",
            "manifest_uri": "s3://bucket/final_dataset/tiny/manifest.json",
            "manifest_sha256": "b" * 64,
            "target_role": "assistant",
            "splits": {"train": 611, "val": 67},
            "sources": [
                {
                    "name": "a|b",
                    "license": "CC-BY-4.0",
                    "records_in": 1234,
                    "kept": 1200,
                    "rejected": {"empty": 33, "exact_duplicate": 1},
                }
            ],
        },
        "tokens": {
            "rows": 611,
            "tokens": 98765,
            "learned_tokens": 43210,
            "truncated_rows": 3,
            "truncated_tokens": 71,
            "packs": 97,
            "pack_fill": 0.9876,
            "trained_tokens": 198765,
            "trained_learned_tokens": 86420,
        },
        "loss": {"first": 7.654, "last": 2.345, "eval": None},
        "moe": {
            "layers": [
                {"layer": 0, "load": [0.4, 0.3, 0.2, 0.1], "entropy": 1.28},
                {"layer": 1, "load": [0.25, 0.25, 0.25, 0.25], "entropy": 1.386},
            ],
            "aux_loss_first": 1.01,
            "aux_loss_last": 1.002,
        },
        "model": {
            "architecture": "MixtralForCausalLM",
            "parameters_total": 3456789,
            "parameters_merged": 0,
            "parameters_trainable": 3456788,
            "base_model": None,
            "base_revision": None,
        },
        "versions": {"training-ready": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "device_count": 0, "processor": "x86_64", "memory_gib": 15.5},
        "checkpoint": "runs/tiny-run/checkpoint-4321",
        "pictures": ["loss.png", "expert_load.png"],
    }


@pytest.fixture
def run_folder(tmp_path: Path, summary: dict[str, Any]) -> Callable[[], Path]:
    """Writes the summary, as changed by the test, and the pictures; returns the run's folder."""

    def write() -> Path:
        folder = tmp_path / "runs" / "tiny-run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary))
        for picture in ("loss.png", "expert_load.png"):
            (folder / picture).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        return folder

    return write


def use(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a person whose bucket this is."""
    settings = store.settings
    monkeypatch.setenv("OVH_S3_ENDPOINT", settings.endpoint_url or "")
    monkeypatch.setenv("OVH_S3_ACCESS_KEY", settings.access_key_id or "")
    monkeypatch.setenv("OVH_S3_SECRET_KEY", settings.secret_access_key or "")
