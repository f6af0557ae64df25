"""A real store with small corpora, a real hub, and model folders that hold no weights: what reads one fails."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from training_ready.check.run import Report, check_recipe
from training_ready.corpus.build import build_corpus
from training_ready.corpus.spec import load_spec
from training_ready.release.connection import hub_api
from training_ready.release.hub_server import EmbeddedHub
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.training.tokenizer import train_tokenizer

from ..corpora import put_corpus, row, talk

REPOSITORY = Path(__file__).parents[2]
CONVERSATIONS = REPOSITORY / "src/training_ready/corpus/quickstart"
TEMPLATES = Path(__file__).parent / "templates"
TOPOLOGIES = Path(__file__).parent / "topologies"


@pytest.fixture(scope="session")
def bucket(store_server: EmbeddedStore) -> ObjectStore:
    """One bucket with every corpus that the recipes of these tests name."""
    store = ObjectStore(store_server.settings(f"check-{uuid.uuid4().hex}"))
    store.create_bucket_if_missing()
    for file in CONVERSATIONS.glob("*.jsonl"):
        store.put_file(f"quickstart/{file.name}", file)
    build_corpus(load_spec(CONVERSATIONS / "corpus.yaml"), store)
    train = [row(talk(i)) for i in range(40)]
    val = [row(talk(i), split="val") for i in range(100, 110)]
    put_corpus(store, "calls", {"train": train, "val": val})
    put_corpus(store, "clients", {"train": [row(talk(i), target="user") for i in range(20)]})
    put_corpus(store, "mixed", {"train": [*train, row(talk(50), target="user")]})
    put_corpus(store, "twice", {"train": [*train, train[0]], "val": val})
    put_corpus(store, "empty_turn", {"train": [*train, row([("user", "Hello."), ("assistant", " ")])]})
    put_corpus(store, "monologue", {"train": [*train, row([("user", "Is anybody there?")])]})
    put_corpus(store, "leak", {"train": train, "val": [row(talk(3), split="val"), *val]})
    put_corpus(store, "long", {"train": [*train, *(row(talk(200 + i, 12)) for i in range(20))], "val": val})
    put_corpus(store, "system", {"train": [row([("system", "Be brief."), *talk(i)]) for i in range(20)]})
    bad = row(talk(77))
    bad["metadata"] = bad["metadata"].replace("cc0-1.0", "")
    put_corpus(store, "unlicensed", {"train": [*train, bad]})
    put_corpus(store, "all_unlicensed", {"train": [bad]})
    put_corpus(store, "lost", {"train": train})
    store.delete("final_dataset/lost/train/shard-00000.parquet")
    put_corpus(store, "changed", {"train": train})
    store.put_bytes("final_dataset/changed/train/shard-00000.parquet", b"PAR1 something else")
    return store


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedHub]:
    """A hub that wants a token."""
    with EmbeddedHub(tmp_path_factory.mktemp("hub"), token="let-me-in") as server:
        with hub_api(server.endpoint_url, "let-me-in") as api:
            api.create_repo("training-ready/taken")
            api.upload_file(
                path_or_fileobj=b"by somebody else", path_in_repo="notes.txt", repo_id="training-ready/taken"
            )
        yield server


@pytest.fixture
def environment(
    store_server: EmbeddedStore, bucket: ObjectStore, hub: EmbeddedHub, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """The variables of a person who has set everything up."""
    for name, value in {**store_server.environment(), "OVH_S3_BUCKET": bucket.bucket}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint_url)
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    return monkeypatch


# --------------------------------------------------------------------------- model folders without weights
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama", "num_hidden_layers": 2},
    "moe": {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen_moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "top1": {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
    },
    "recurrent": {
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "narrow": {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 300},
    "short": {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 128},
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 600,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``models/<name>``: configuration and tokenizer; ``dense-<template>`` has another chat template."""
    root = tmp_path_factory.mktemp("models")
    texts = [text for i in range(60) for _, text in talk(i)]
    tokenizer = train_tokenizer(texts, vocab_size=600)
    chatml = str(tokenizer.chat_template)
    for name, values in CONFIGS.items():
        values = {**SMALL, **values}
        AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for path in TEMPLATES.glob("*.jinja"):
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        AutoConfig.for_model("llama", **SMALL, num_hidden_layers=2).save_pretrained(
            root / f"dense-{path.stem}"
        )
        tokenizer.save_pretrained(root / f"dense-{path.stem}")
    tokenizer.chat_template = chatml
    for name, settings in {"pad-is-end": {"pad_token": "<|im_end|>"}, "no-pad": {"pad_token": None}}.items():
        folder = root / f"dense-{name}"
        AutoConfig.for_model("llama", **SMALL, num_hidden_layers=2).save_pretrained(folder)
        tokenizer.pad_token = settings["pad_token"]
        tokenizer.save_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = None
    AutoConfig.for_model("llama", **SMALL, num_hidden_layers=2).save_pretrained(root / "dense-no-template")
    tokenizer.save_pretrained(root / "dense-no-template")
    (root / "not-a-model").mkdir()
    return root


# --------------------------------------------------------------------------- recipes
Keys = dict[str, str | None]
Check = Callable[..., Report]


@pytest.fixture
def check(
    tmp_path: Path, models: Path, environment: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> Check:
    """``check(keys, **options)`` writes one key per line and examines the recipe in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for path in TOPOLOGIES.iterdir():
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")

    def examine(keys: Keys, *, skip: Sequence[str] = (), **options: Any) -> Report:
        lines = [f"{key}: {value}" for key, value in keys.items() if value is not None]
        text = "\n".join(lines)
        for word, path in {
            "MODELS": models,
            "HERE": tmp_path,
            "TEMPLATES": TEMPLATES,
            "TOPOLOGIES": tmp_path,
        }.items():
            text = text.replace(word, str(path))
        (tmp_path / "recipe.yaml").write_text(text + "\n", encoding="utf-8")
        # The memory of a step is traced by tests of its own, in many seconds.
        return check_recipe(Path("recipe.yaml"), skip=["memory", *skip], **options)

    return examine
