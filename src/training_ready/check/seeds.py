"""Can the run be repeated, and is what it is evaluated on unseen?"""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow.parquet as pq

from training_ready.check.context import CheckContext, Missing
from training_ready.check.corpora import trained_splits
from training_ready.check.finding import Finding, failed, not_run, passed
from training_ready.corpus.manifest import Shard
from training_ready.storage.objects import ObjectStore

_MOST_RECORDS = 500_000
"""Hashes that are compared; 71 bytes each are read."""


def probe_seeds(context: CheckContext) -> list[Finding]:
    """The seeds of weights and order; conversations that are in the train and in the evaluation split."""
    return [_seeds(context), *_overlap(context)]


def _seeds(context: CheckContext) -> Finding:
    recipe = context.recipe
    seed, data_seed = recipe.effective("seed"), recipe.effective("data_seed")
    order = f"data_seed {data_seed}" if data_seed is not None else f"seed {seed} too"
    origin = "" if context.is_set("seed") else " (TRL's default)"
    return passed(f"weights and dropout from seed {seed}{origin}, the order of rows from {order}", seed=seed)


def _overlap(context: CheckContext) -> list[Finding]:
    data = context.recipe.data
    if data.eval_split is None:
        return []
    try:
        corpora = context.corpora
    except Missing as missing:
        return [
            not_run(f"train and evaluation could not be compared: {missing.blame}", key="data.eval_split")
        ]
    seen, complete = set[str](), True
    for name, split in trained_splits(context.recipe):
        more, all_of_it = _hashes(corpora[name].store, corpora[name].shards(split))
        seen, complete = seen | more, complete and all_of_it
    unseen, all_of_them = _hashes(context.corpus.store, context.corpus.shards(data.eval_split))
    shared = seen & unseen
    if shared:
        return [
            failed(
                f"{len(shared):,} of {len(unseen):,} conversations of {data.eval_split} are trained on too, "
                f"the first is {min(shared)}: the evaluation would measure memory",
                key="data.eval_split",
                fix="build the corpus again: its build splits by group",
                shared=len(shared),
            )
        ]
    extent = "" if complete and all_of_them else f" among the first {len(seen):,}"
    return [
        passed(
            f"none of {len(unseen):,} conversations of {data.eval_split} is trained on{extent}",
            shared=0,
        )
    ]


def _hashes(store: ObjectStore, shards: Sequence[Shard]) -> tuple[set[str], bool]:
    """Content hashes of a split, and whether they are all of it."""
    found: set[str] = set()
    for shard in shards:
        if len(found) + shard.records > _MOST_RECORDS and found:
            return found, False
        reader = io.BufferedReader(store.open(shard.key, ahead=False), buffer_size=1 << 20)
        column = pq.ParquetFile(reader).read(columns=["content_hash"])["content_hash"]
        found.update(column.to_pylist())
    return found, True
