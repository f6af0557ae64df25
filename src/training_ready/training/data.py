"""What does the run train on? The corpus as token shards, and the plan of their packs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from trl import SFTConfig

from training_ready.corpus.manifest import Manifest
from training_ready.recipe.recipe import Recipe
from training_ready.storage.layout import locate
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.stream.plan import PackPlan
from training_ready.stream.render import ChatRenderer
from training_ready.stream.shards import StreamError, read_corpus_shard
from training_ready.stream.tokens import LengthPolicy, TokenCache, TokenCounts, TokenShard
from training_ready.training.arguments import world

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The train split and, where the recipe evaluates, the evaluation split; ``max_length`` tokens make a pack."""

    max_length: int
    counts: TokenCounts
    plan: PackPlan
    eval_plan: PackPlan | None


def open_corpus(corpus: str) -> tuple[Manifest, ObjectStore]:
    """The manifest that ``data.corpus`` names, and the bucket that holds it."""
    settings = StorageSettings.from_environment()
    place = locate(settings, corpus)
    store = ObjectStore(settings, place.bucket)
    return Manifest.load(store, place.key), store


def corpus_texts(store: ObjectStore, manifest: Manifest, split: str) -> Iterator[str]:
    """Every turn of a split, for training a tokenizer."""
    for shard in manifest.shards_of(split):
        for records in read_corpus_shard(store, shard, ["messages"]):
            for record in records:
                yield from (message["content"] for message in record["messages"])


def prepare_data(
    recipe: Recipe,
    args: SFTConfig,
    manifest: Manifest,
    store: ObjectStore,
    renderer: ChatRenderer,
    console: Console,
) -> RunData:
    """Tokenises what is not tokenised yet, and plans the packs.

    Raises:
        StreamError: a split is missing or empty, or the corpus is not what its manifest says.
    """
    if args.max_length is None:
        raise StreamError(
            "max_length must be set: it is the length of a pack and the limit of a conversation"
        )
    cache = TokenCache(
        store=store,
        corpus_prefix=manifest.uri.removeprefix(store.uri("")).rpartition("/")[0],
        renderer=renderer,
        policy=LengthPolicy(max_length=args.max_length, overlong=recipe.stream.overlong),
    )
    train = _tokenise(cache, manifest, recipe.data.train_split, console)
    evaluation = (
        _tokenise(cache, manifest, recipe.data.eval_split, console) if recipe.data.eval_split else None
    )
    return RunData(
        max_length=args.max_length,
        counts=_total(train),
        plan=_plan(recipe, args, train),
        eval_plan=None if evaluation is None else _plan(recipe, args, evaluation, shuffle=False),
    )


def _tokenise(cache: TokenCache, manifest: Manifest, split: str, console: Console) -> list[TokenShard]:
    rank, world_size = world()
    shards = manifest.shards_of(split)
    if not shards:
        raise StreamError(
            f"the corpus {manifest.name!r} has no split {split!r}; it has {sorted(manifest.splits)}"
        )
    mine = sum(shard.records for index, shard in enumerate(shards) if index % world_size == rank)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"tokenising {split}", total=mine)
        ready = cache.ensure(shards, rank=rank, world_size=world_size, advance=lambda n: bar.advance(task, n))
    counts = _total(ready)
    logger.info(
        f"{split}: {counts.rows} conversations, {counts.tokens} tokens, {counts.learned_tokens} learned; truncated "
        f"{counts.truncated_rows} rows by {counts.truncated_tokens} tokens; dropped {counts.dropped_rows}"
    )
    return ready


def _total(shards: list[TokenShard]) -> TokenCounts:
    counts = TokenCounts()
    for shard in shards:
        counts.add(shard.counts)
    return counts


def _plan(recipe: Recipe, args: SFTConfig, shards: list[TokenShard], *, shuffle: bool = True) -> PackPlan:
    return PackPlan(
        shards,
        max_length=args.max_length,
        seed=args.seed if args.data_seed is None else args.data_seed,
        packing=args.packing,
        blocks_per_group=recipe.stream.blocks_per_group,
        stages=recipe.data.stages,
        shuffle=shuffle,
    )


def steps_of(plan: PackPlan, epochs: float, global_batch: int) -> int:
    """Optimizer steps that cover ``epochs`` passes; the last step may reach into the next pass, no row is left out."""
    whole = int(epochs)
    packs = sum(plan.packs_in_epoch(epoch) for epoch in range(whole))
    packs += math.ceil((epochs - whole) * plan.packs_in_epoch(whole)) if epochs > whole else 0
    return math.ceil(packs / global_batch)
