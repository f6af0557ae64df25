"""What a person sees of a stream before training on it: packs as text, distributions, the plan on many ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from training_ready.cli import app
from training_ready.corpus.build import build_corpus
from training_ready.corpus.spec import load_spec
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.stream import load
from training_ready.training.tokenizer import load_tokenizer

CONVERSATIONS = Path(__file__).parents[2] / "src/training_ready/corpus/quickstart"
MANIFEST = "final_dataset/quickstart/manifest.json"
RECIPE = f"""
data: {{corpus: {MANIFEST}}}
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
           max_position_embeddings: 1024}}
  tokenizer: {{vocab_size: 600}}
attn_implementation: sdpa
bf16: false
use_cpu: true
max_length: 1024
packing: true
num_train_epochs: 2
per_device_train_batch_size: 1
seed: 7
"""


@pytest.fixture
def ready(store_server: EmbeddedStore, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped conversations, built in the bucket that the environment names."""
    for file in CONVERSATIONS.glob("*.jsonl"):
        store.put_file(f"quickstart/{file.name}", file)
    build_corpus(load_spec(CONVERSATIONS / "corpus.yaml"), store)
    for name, value in {**store_server.environment(), "OVH_S3_BUCKET": store.bucket}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def command(ready: None, tmp_path: Path) -> Callable[..., str]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"output_dir: {tmp_path / 'run'}\n{RECIPE}", encoding="utf-8")

    def run(name: str, *arguments: str) -> str:
        result = CliRunner().invoke(app, ["data", name, str(recipe), *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_peek_marks_what_is_learned(command: Callable[..., str]) -> None:
    out = command("peek", "--packs", "1", "--position", "3")
    assert "pack 3:" in out
    first = out.index("<|im_start|>assistant\n»")
    assert "<|im_end|>«" in out[first:]
    assert "»<|im_start|>" not in out


def test_stats_count_every_row_and_draw(command: Callable[..., str], tmp_path: Path) -> None:
    picture = tmp_path / "stats.png"
    found = json.loads(command("stats", "--json", "--plot", str(picture)))
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows, tokens = (sum(cell[name] for cell in found["cells"]) for name in ("rows", "tokens"))
    assert (rows, tokens) == (found["policy"]["rows"], found["policy"]["tokens"])
    part = found["parts"]["data"]
    assert part["fill"] == pytest.approx(tokens / (part["packs_per_epoch"] * 1024))
    assert part["lengths"]["shortest"] < part["lengths"]["median"] < part["lengths"]["longest"] <= 1024
    assert "quickstart" in command("stats") or found["cells"][0]["source"] in command("stats")


def test_simulate_deals_every_pack_once(command: Callable[..., str]) -> None:
    parts: dict[str, Any] = json.loads(command("stats", "--json"))["parts"]
    found = json.loads(command("simulate", "--ranks", "8", "--json"))
    assert found["packs"] == 2 * parts["data"]["packs_per_epoch"]
    assert found["steps"] == found["steps_in_all"] == -(-found["packs"] // 8)
    assert "the same on every rank" in command("simulate", "--ranks", "8")


def test_a_mixture_of_the_recipe_is_seen(command: Callable[..., str]) -> None:
    sources = sorted({cell["source"] for cell in json.loads(command("stats", "--json"))["cells"]})
    if len(sources) < 2:
        pytest.fail(f"the shipped conversations are of one source only: {sources}")
    mixture = {"a": {"sources": sources[:1], "weight": 1}, "b": {"sources": sources[1:], "weight": 3}}
    found = json.loads(command("stats", f"stream.mixture={json.dumps(mixture)}", "--json"))
    assert set(found["parts"]) == {"a", "b"}
    assert {cell["source"] for cell in found["cells"] if cell["part"] == "a"} == set(sources[:1])


def test_load_streams_a_corpus_without_a_recipe(ready: None, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = load_tokenizer(str(tmp_path / "tokenizer"))
    packs = list(load(MANIFEST, own, max_length=2048, epochs=1))
    again = list(load(MANIFEST, own, max_length=2048, epochs=1).take(2))
    assert [p["input_ids"].tolist() for p in again] == [p["input_ids"].tolist() for p in packs[:2]]
    halves = [
        list(load(MANIFEST, own, max_length=2048, epochs=1, global_batch=4, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    assert len(halves[0]) == len(halves[1])
    assert sum(len(p["input_ids"]) for half in halves for p in half if (p["labels"] >= 0).any()) == sum(
        len(p["input_ids"]) for p in packs
    )
