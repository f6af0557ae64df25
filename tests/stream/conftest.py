"""Corpora of numbered conversations in a real bucket, for asking which rows came and in which order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from training_ready.storage.objects import ObjectStore
from training_ready.stream.assemble import Order, Part, pack_reader
from training_ready.stream.groups import PackReader
from training_ready.stream.index import TokenIndex
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.render import ChatRenderer
from training_ready.stream.token_set import TokenSet
from training_ready.stream.tokens import TokenCache
from training_ready.training.tokenizer import train_tokenizer

from ..corpora import put_shard

WORDS = ["night", "house", "work", "brother", "silence", "river", "letter", "breath", "morning", "door"]


def numbered_conversation(
    number: int,
    *,
    stage: str = "stage1_foundation",
    role: str = "assistant",
    source: str = "numbers",
    metadata: str = "{}",
) -> dict[str, Any]:
    """A conversation whose first words say which row it is."""
    words = random.Random(number).choices(WORDS, k=3 + number * 7 % 40)
    return {
        "content_hash": f"sha256:{hashlib.sha256(str(number).encode()).hexdigest()}",
        "messages": [
            {"role": "user", "content": f"row {number} :"},
            {"role": "assistant", "content": " ".join(words)},
        ],
        "source_family": source,
        "stage": stage,
        "target_role": role,
        "domain": None,
        "metadata": metadata,
    }


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    texts = [message["content"] for n in range(50) for message in numbered_conversation(n)["messages"]]
    return train_tokenizer(texts, vocab_size=400)


@pytest.fixture
def make_cache(store: ObjectStore, tokenizer: Any) -> Callable[..., TokenCache]:
    def make(*, max_length: int = 128, overlong: str = "truncate", role: str = "assistant") -> TokenCache:
        return TokenCache(
            store=store,
            corpus_prefix="final_dataset/numbers",
            renderer=ChatRenderer(tokenizer, role),
            policy=LengthPolicy(max_length=max_length, overlong=overlong),
        )

    return make


PREFIX = "final_dataset/numbers"


@pytest.fixture
def numbers(store: ObjectStore, make_cache: Callable[..., TokenCache]) -> TokenIndex:
    """Rows 0..99 in three shards of unequal length."""
    borders = [(0, 57), (57, 60), (60, 100)]
    shards = [
        put_shard(store, f"{PREFIX}/train/shard-{i}.parquet", [numbered_conversation(n) for n in range(*b)])
        for i, b in enumerate(borders)
    ]
    return make_cache().ensure(shards)


@pytest.fixture
def read_packs(store: ObjectStore, numbers: TokenIndex) -> Callable[..., PackReader]:
    """Packs of the numbered rows, in the bucket."""
    tokens = TokenSet(name="numbers", store=store, prefix=f"{PREFIX}/tokens", index=numbers)

    def read(**changes: Any) -> PackReader:
        order = Order(**{"max_length": 128, "seed": 3, "blocks_per_group": 2, **changes})
        return pack_reader({"data": Part(tokens=tokens)}, order)

    return read
