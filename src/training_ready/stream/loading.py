"""How is a corpus streamed without a recipe? One call from a manifest to a ``datasets.IterableDataset``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import IterableDataset

from training_ready.corpus.manifest import Manifest
from training_ready.storage.disk_cache import DiskCache
from training_ready.storage.layout import locate
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.stream.assemble import Order, Part, TokenSet, pack_reader
from training_ready.stream.dataset import pack_stream
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.plan import lanes_for
from training_ready.stream.render import ChatRenderer
from training_ready.stream.shards import StreamError
from training_ready.stream.tokens import TokenCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(
    manifest: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    split: str = "train",
    target_role: str = "assistant",
    sources: Sequence[str] | None = None,
    stages: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    overlong: str = "truncate",
    packing: bool = True,
    seed: int = 0,
    epochs: float | None = None,
    global_batch: int = 1,
    lanes: int | None = None,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    settings: StorageSettings | None = None,
) -> IterableDataset:
    """The packs of a built corpus, tokenised now if nobody has done so before.

    Items hold ``input_ids``, ``labels`` (−100 where nothing is learned) and ``seq_lengths``; ``.map``, ``.take``,
    ``state_dict`` and ``load_state_dict`` work as in any iterable dataset, ``.shuffle`` and ``.shard`` are refused:
    the order is shuffled by ``seed``, ranks are told apart by ``rank`` and ``world_size``.

    Args:
        manifest: ``s3://bucket/…/manifest.json``, or its key in the bucket of the settings.
        max_length: tokens in a pack.
        epochs: None repeats for ever; after the last pack come empty ones until the global batch is full.
        global_batch: packs of all ranks together; every rank yields ``global_batch / world_size`` of each.
        position: packs of all ranks before the first, a multiple of ``global_batch``.
        settings: of the bucket; None reads the ``OVH_S3_*`` environment.

    Raises:
        StreamError: the split is empty, or numbers do not divide.
        RenderError: the tokenizer has no usable chat template.

    Example::

        from training_ready.stream import load
        packs = load("s3://data/final_dataset/therapeutic/manifest.json", tokenizer, max_length=4096)
    """
    settings = settings or StorageSettings.from_environment()
    place = locate(settings, manifest)
    store = ObjectStore(settings, place.bucket, cache=DiskCache.from_environment())
    corpus = Manifest.load(store, place.key)
    shards = corpus.shards_of(split)
    if not shards:
        raise StreamError(
            f"the corpus {corpus.name!r} has no split {split!r}; it has {sorted(corpus.splits)}"
        )
    prefix = place.key.rpartition("/")[0]
    policy = LengthPolicy(max_length=max_length, overlong=overlong)
    cache = TokenCache(
        store=store, corpus_prefix=prefix, renderer=ChatRenderer(tokenizer, target_role), policy=policy
    )
    tokens = TokenSet(
        name=f"{corpus.name} {split}",
        store=store,
        prefix=f"{prefix}/tokens",
        index=cache.ensure(shards, rank=rank, world_size=world_size),
    )
    part = Part(tokens=tokens, sources=sources, stages=stages, components=components)
    order = Order(
        max_length=max_length,
        seed=seed,
        packing=packing,
        lanes=lanes or lanes_for(global_batch),
        epochs=epochs,
    )
    packs = pack_reader({"data": part}, order, remember=rank == 0)
    return pack_stream(packs, global_batch=global_batch, position=position, rank=rank, world_size=world_size)
