"""What does the run train on? The corpus as tokens, and the plan of their packs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from training_ready.corpus.manifest import Manifest, Shard
from training_ready.recipe.recipe import Recipe
from training_ready.storage.layout import locate
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.storage.shared_cache import cache_from_environment
from training_ready.stream.assemble import Order, Part, pack_reader
from training_ready.stream.groups import PackReader
from training_ready.stream.index import TokenIndex
from training_ready.stream.lengths import LengthPolicy, TokenCounts
from training_ready.stream.plan import lanes_for
from training_ready.stream.render import ChatRenderer
from training_ready.stream.shards import StreamError, read_corpus_shard
from training_ready.stream.token_set import TokenSet
from training_ready.stream.tokens import Share, TokenCache
from training_ready.training.arguments import world

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The packs that are trained and, where the recipe evaluates, those of the evaluation split.

    ``manifests``: of every corpus by name, the first that of ``data.corpus``; ``tokens``: every split that is trained.
    """

    max_length: int
    manifests: dict[str, Manifest]
    tokens: list[TokenSet]
    packs: PackReader
    eval_packs: PackReader | None

    @property
    def counts(self) -> TokenCounts:
        """Of all rows that are tokenised by now."""
        counts = TokenCounts()
        for one in self.tokens:
            counts.add(one.index.counts)
        return counts

    @property
    def untokenised_blocks(self) -> int:
        """Row groups of the corpora that a run may leave behind that ends before its first pass."""
        return sum(one.blocks - len(one.index.blocks) for one in self.tokens)


def open_corpus(corpus: str) -> tuple[Manifest, ObjectStore]:
    """The manifest that ``data.corpus`` names, and the bucket that holds it."""
    settings = StorageSettings.from_environment()
    place = locate(settings, corpus)
    store = ObjectStore(settings, place.bucket, cache=cache_from_environment())
    return Manifest.load(store, place.key), store


def corpus_texts(store: ObjectStore, manifest: Manifest, split: str) -> Iterator[str]:
    """Every turn of a split, for training a tokenizer."""
    for shard in manifest.shards_of(split):
        for records in read_corpus_shard(store, shard, ["messages"]):
            for record in records:
                yield from (message["content"] for message in record["messages"])


def prepare_data(
    recipe: Recipe,
    manifest: Manifest,
    store: ObjectStore,
    renderer: ChatRenderer,
    console: Console,
    *,
    global_batch: int,
) -> RunData:
    """Tokenises what is not tokenised yet, and plans the packs.

    Raises:
        StreamError: a split is missing or empty, a corpus is not what its manifest says, or the mixture is none.
    """
    max_length = recipe.effective("max_length")
    if max_length is None:
        raise StreamError(
            "max_length must be set: it is the length of a pack and the limit of a conversation"
        )
    corpora = _Corpora(recipe, manifest, store, renderer, console, max_length)
    parts = _parts(recipe, corpora)
    train = list({id(part.tokens): part.tokens for part in parts.values()}.values())
    packs = pack_reader(parts, _order(recipe, global_batch), remember=world()[0] == 0)
    _refuse_too_many_steps(packs, recipe.effective("max_steps"), global_batch)
    evaluation = None
    if recipe.data.eval_split:
        chosen = Part(tokens=corpora.tokens(None, recipe.data.eval_split), stages=recipe.data.stages)
        fixed = Order(
            max_length=max_length,
            seed=0,
            packing=recipe.effective("packing"),
            blocks_per_group=recipe.stream.blocks_per_group,
            lanes=1,
            shuffle=False,
        )
        evaluation = pack_reader({"evaluation": chosen}, fixed, remember=world()[0] == 0)
    return RunData(
        max_length=max_length,
        manifests=corpora.manifests,
        tokens=train,
        packs=packs,
        eval_packs=evaluation,
    )


class _Corpora:
    """The corpora of a run, each opened once and each split tokenised once."""

    def __init__(
        self,
        recipe: Recipe,
        manifest: Manifest,
        store: ObjectStore,
        renderer: ChatRenderer,
        console: Console,
        max_length: int,
    ) -> None:
        self._renderer, self._console = renderer, console
        self._policy = LengthPolicy(max_length=max_length, overlong=recipe.stream.overlong)
        self._workers = recipe.stream.tokenise_workers or _cores_of_this_rank()
        self._open = {recipe.data.corpus: (manifest, store)}
        self._main, self._train_split = recipe.data.corpus, recipe.data.train_split
        self._tokens: dict[tuple[str, str], TokenSet] = {}
        self._early = data_seed(recipe) if begins_early(recipe) else None

    @property
    def manifests(self) -> dict[str, Manifest]:
        return {manifest.uri: manifest for manifest, _ in self._open.values()}

    def tokens(self, corpus: str | None, split: str) -> TokenSet:
        corpus = corpus or self._main
        if corpus not in self._open:
            self._open[corpus] = open_corpus(corpus)
        manifest, store = self._open[corpus]
        key = (manifest.uri, split)
        if key not in self._tokens:
            prefix = manifest.uri.removeprefix(store.uri("")).rpartition("/")[0]
            cache = TokenCache(
                store=store, corpus_prefix=prefix, renderer=self._renderer, policy=self._policy
            )
            shards, name = manifest.shards_of(split), f"{manifest.name} {split}"
            if not shards:
                raise StreamError(
                    f"the corpus {manifest.name!r} has no split {split!r}; it has {sorted(manifest.splits)}"
                )
            rank, world_size = world()
            share = Share(rank=rank, world_size=world_size, workers=self._workers)
            if self._early is not None and split == self._train_split:
                self._tokens[key] = cache.begin(name, shards, self._early, replace(share, ahead=True))
            else:
                index = _tokenise(cache, shards, split, share, self._console)
                self._tokens[key] = TokenSet(name=name, store=store, prefix=cache.prefix, index=index)
        return self._tokens[key]


def _parts(recipe: Recipe, corpora: _Corpora) -> dict[str, Part]:
    data, stream = recipe.data, recipe.stream
    if stream.mixture is None:
        if stream.curriculum:
            raise StreamError("stream.curriculum changes the weights of stream.mixture; name its parts there")
        return {"data": Part(tokens=corpora.tokens(None, data.train_split), stages=data.stages)}
    if data.stages:
        raise StreamError(
            "data.stages chooses rows when there is no mixture; write stages into stream.mixture's parts"
        )
    return {
        name: Part(
            tokens=corpora.tokens(part.corpus, part.split or data.train_split),
            sources=part.sources,
            stages=part.stages,
            components=part.components,
            weight=part.weight,
            max_epochs=part.max_epochs,
        )
        for name, part in stream.mixture.items()
    }


def _order(recipe: Recipe, global_batch: int) -> Order:
    stream = recipe.stream
    return Order(
        max_length=recipe.effective("max_length"),
        seed=data_seed(recipe),
        packing=recipe.effective("packing"),
        blocks_per_group=stream.blocks_per_group,
        lanes=stream.lanes or lanes_for(global_batch),
        by=stream.mixture_by,
        temperature=stream.temperature,
        epochs=None if recipe.effective("max_steps") > 0 else recipe.effective("num_train_epochs"),
        curriculum=[(step.from_step * global_batch, step.weights) for step in stream.curriculum or []],
    )


def order_facts(recipe: Recipe, global_batch: int) -> dict[str, Any]:
    """What the order of packs depends on beside the data, by the names of ``stream.resume_allow``."""
    order = _order(recipe, global_batch)
    mixture = recipe.stream.model_dump(include={"mixture", "mixture_by", "temperature", "curriculum"})
    return {
        "mixture": json.dumps([mixture, recipe.data.train_split, recipe.data.stages], sort_keys=True),
        "overlong": recipe.stream.overlong,
        "early_start": begins_early(recipe),
        **{
            name: getattr(order, name)
            for name in ("max_length", "packing", "seed", "blocks_per_group", "lanes")
        },
    }


def data_seed(recipe: Recipe) -> int:
    """The seed of the order of packs."""
    own = recipe.effective("data_seed")
    return int(recipe.effective("seed") if own is None else own)


def begins_early(recipe: Recipe) -> bool:
    """Whether the order is one whose beginning needs no count of all packs."""
    return (
        recipe.stream.early_start
        and recipe.stream.mixture is None
        and recipe.effective("max_steps") > 0
        and recipe.data.eval_split != recipe.data.train_split
    )


def _refuse_too_many_steps(packs: PackReader, max_steps: int, global_batch: int) -> None:
    steps = packs.plan.steps(global_batch)
    if steps is not None and max_steps > steps:
        raise StreamError(
            f"every part of stream.mixture is used up after step {steps}, max_steps is {max_steps}: raise "
            "max_epochs of a part, or lower max_steps"
        )


def _cores_of_this_rank() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _tokenise(
    cache: TokenCache, shards: Sequence[Shard], split: str, share: Share, console: Console
) -> TokenIndex:
    blocks = [group.records for shard in shards for group in shard.row_groups]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"tokenising {split}", total=sum(blocks[share.rank :: share.world_size]))
        ready = cache.ensure(shards, replace(share, advance=lambda n: bar.advance(task, n)))
    counts = ready.counts
    logger.info(
        f"{split}: {counts.rows} conversations, {counts.tokens} tokens, {counts.learned_tokens} learned; truncated "
        f"{counts.truncated_rows} rows by {counts.truncated_tokens} tokens; split {counts.split_rows} into "
        f"{counts.split_pieces}; dropped {counts.dropped_rows}"
    )
    return ready
