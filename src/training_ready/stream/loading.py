"""How is data streamed without a recipe? From corpora or raw objects to a ``datasets.IterableDataset``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from datasets import IterableDataset

from training_ready.corpus.adapters import Form
from training_ready.corpus.manifest import Manifest
from training_ready.corpus.raw import RawSource
from training_ready.corpus.raw_objects import find_objects
from training_ready.corpus.readers import Format
from training_ready.corpus.record import Role
from training_ready.storage.layout import locate
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.storage.shared_cache import cache_from_environment
from training_ready.stream.assemble import Order, Part, needs_no_counts, pack_reader
from training_ready.stream.dataset import pack_stream
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.plan import lanes_for
from training_ready.stream.raw_tokens import RawTokenCache
from training_ready.stream.render import ChatRenderer
from training_ready.stream.shards import StreamError
from training_ready.stream.token_set import TokenSet
from training_ready.stream.tokens import Share, TokenCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RAW_TOKENS = "raw_tokens"  # where tokens of raw objects lie in the bucket of the settings


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusPart:
    """Rows of a built corpus: ``manifest`` is ``s3://bucket/…/manifest.json``, or its key in the settings' bucket.

    ``sources``, ``stages``, ``components``: rows in all given lists only. ``weight``: share of the mixture, None in
    all parts for their own sizes. ``max_epochs``: passes after which the part is used up.
    """

    manifest: str
    split: str = "train"
    sources: Sequence[str] | None = None
    stages: Sequence[str] | None = None
    components: Sequence[str] | None = None
    weight: float | None = None
    max_epochs: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPart:
    """Rows of raw objects: JSON lines, JSON arrays, CSV or Parquet, also .gz and .zst (not Parquet).

    ``paths``: ``s3://bucket/key``, keys, local paths (``/…``, ``./…``) and ``hf://datasets/owner/name@revision/file``,
    each also as a pattern. ``records_key``: of an array inside an object. ``form``, ``columns``: how a row says who
    says what, as in a corpus specification. ``bad_rows``: as many may be no conversation and are set aside.
    """

    paths: Sequence[str]
    format: Format = "auto"
    records_key: str = "conversations"
    form: Form = "auto"
    columns: Mapping[Role, Sequence[str]] | None = None
    bad_rows: int = 0
    weight: float | None = None
    max_epochs: float | None = None


def load(
    data: str | RawPart | Mapping[str, CorpusPart | RawPart],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    target_role: str = "assistant",
    overlong: Literal["truncate", "split_turns", "drop", "error"] = "truncate",
    packing: bool = True,
    seed: int = 0,
    epochs: float | None = None,
    global_batch: int = 1,
    lanes: int | None = None,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    settings: StorageSettings | None = None,
) -> IterableDataset:
    """The packs of a built corpus, of raw objects, or of a mixture; tokenised now if nobody has done so before.

    Where no pack needs to be counted (one part, no ``epochs``, no ``max_epochs``) a built corpus yields its first packs
    when its first 1,000 conversations are tokenised, and tokenises on as they are asked for.

    Items hold ``input_ids``, ``labels`` (−100 where nothing is learned) and ``seq_lengths``; ``.map``, ``.take``,
    ``state_dict`` and ``load_state_dict`` work as in any iterable dataset, ``.shuffle`` and ``.shard`` are refused:
    the order is shuffled by ``seed``, ranks are told apart by ``rank`` and ``world_size``.

    Args:
        data: a manifest (``s3://bucket/…/manifest.json``, or its key in the bucket of the settings), raw objects, or
            parts by name.
        max_length: tokens in a pack.
        epochs: None repeats for ever; after the last pack come empty ones until the global batch is full.
        global_batch: packs of all ranks together; every rank yields ``global_batch / world_size`` of each.
        position: packs of all ranks before the first, a multiple of ``global_batch``.
        workers: processes that tokenise shards of built corpora; above 1 the program needs the usual
            ``if __name__ == "__main__":``, as they are spawned.
        settings: of the bucket; None reads the ``OVH_S3_*`` environment.

    Raises:
        StreamError: a split is empty, or numbers do not divide.
        SourceError: a raw object cannot be read, or holds more bad rows than its part allows.
        RenderError: the tokenizer has no usable chat template.

    Example::

        from training_ready.stream import CorpusPart, RawPart, load
        packs = load(
            {
                "built": CorpusPart(manifest="final_dataset/therapeutic/manifest.json", weight=3),
                "notes": RawPart(paths=["s3://data/notes/*.jsonl.zst"], weight=1),
            },
            tokenizer,
            max_length=4096,
        )
    """
    if not isinstance(data, Mapping):
        data = {"data": CorpusPart(manifest=data) if isinstance(data, str) else data}
    tokens = _Tokens(
        settings=settings or StorageSettings.from_environment(),
        renderer=ChatRenderer(tokenizer, target_role),
        policy=LengthPolicy(max_length=max_length, overlong=overlong),
        share=Share(rank=rank, world_size=world_size, workers=workers),
        early=seed if needs_no_counts(data.values(), epochs=epochs) else None,
    )
    parts = {name: tokens.part(name, one) for name, one in data.items()}
    order = Order(
        max_length=max_length,
        seed=seed,
        packing=packing,
        lanes=lanes or lanes_for(global_batch),
        epochs=epochs,
    )
    packs = pack_reader(parts, order, remember=rank == 0)
    return pack_stream(packs, global_batch=global_batch, position=position, rank=rank, world_size=world_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """Tokenises parts, or finds their tokens; parts of one split share them."""

    settings: StorageSettings
    renderer: ChatRenderer
    policy: LengthPolicy
    share: Share
    early: int | None  # the seed of an order that begins before all is tokenised
    known: dict[tuple[str, str], TokenSet] = field(default_factory=dict)

    def part(self, name: str, one: CorpusPart | RawPart) -> Part:
        if isinstance(one, RawPart):
            return Part(tokens=self._of_raw(name, one), weight=one.weight, max_epochs=one.max_epochs)
        if (one.manifest, one.split) not in self.known:
            self.known[one.manifest, one.split] = self._of_corpus(one.manifest, one.split)
        return Part(
            tokens=self.known[one.manifest, one.split],
            sources=one.sources,
            stages=one.stages,
            components=one.components,
            weight=one.weight,
            max_epochs=one.max_epochs,
        )

    def _of_corpus(self, manifest: str, split: str) -> TokenSet:
        place = locate(self.settings, manifest)
        store = self._store(place.bucket)
        corpus = Manifest.load(store, place.key)
        shards = corpus.shards_of(split)
        if not shards:
            raise StreamError(
                f"the corpus {corpus.name!r} has no split {split!r}; it has {sorted(corpus.splits)}"
            )
        prefix = place.key.rpartition("/")[0]
        cache = TokenCache(store=store, corpus_prefix=prefix, renderer=self.renderer, policy=self.policy)
        name = f"{corpus.name} {split}"
        if self.early is not None:
            return cache.begin(name, shards, self.early, self.share)
        index = cache.ensure(shards, self.share)
        return TokenSet(name=name, store=store, prefix=cache.prefix, index=index)

    def _of_raw(self, name: str, one: RawPart) -> TokenSet:
        place = locate(self.settings, _RAW_TOKENS)
        store = self._store(place.bucket)
        source = RawSource(
            name=name,
            objects=find_objects(one.paths, store),
            format=one.format,
            records_key=one.records_key,
            form=one.form,
            columns=one.columns,
            bad_rows=one.bad_rows,
        )
        cache = RawTokenCache(
            store=store, prefix=place.key, renderer=self.renderer, policy=self.policy, source=source
        )
        index = cache.ensure(rank=self.share.rank, world_size=self.share.world_size)
        return TokenSet(name=name, store=store, prefix=place.key, index=index)

    def _store(self, bucket: str) -> ObjectStore:
        return ObjectStore(self.settings, bucket, cache=cache_from_environment())
