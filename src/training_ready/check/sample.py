"""The first records of each source, read by ranged requests: a corpus of terabytes costs a few megabytes to look at."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from training_ready import TrainingReadyError
from training_ready.corpus.manifest import Manifest, Shard
from training_ready.storage.objects import ObjectStore
from training_ready.stream.render import ChatRenderer, RenderedConversation, RenderError

WHOLE = 1000
"""A split of at most so many records is read whole: what is counted in it is exact."""
MOST_SHARDS = 64
COLUMNS = ("content_hash", "messages", "source_family", "stage", "target_role", "metadata")


class SampleError(TrainingReadyError):
    """The split cannot be sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """``records`` are rows of the corpus as dictionaries; ``total`` is the size of the split in records."""

    split: str
    records: list[dict[str, Any]]
    total: int
    unreached: tuple[str, ...] = ()
    """Source families of which no record was found in the shards that were opened."""

    @property
    def whole(self) -> bool:
        return len(self.records) == self.total

    def __str__(self) -> str:
        return f"{len(self.records):,} of {self.total:,} records of {self.split}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSample:
    """The sampled records as tokens, uncut, in the order of the sample; ``faults`` could not be rendered."""

    rows: list[RenderedConversation]
    stages: list[str]
    faults: list[tuple[str, str]]
    """(content hash, reason)."""
    max_length: int | None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(row.input_ids) for row in self.rows], dtype=np.int64)


def read_sample(store: ObjectStore, manifest: Manifest, split: str, per_source: int) -> Sample:
    """Up to ``per_source`` records of each source family; a small split whole.

    Raises:
        SampleError: the corpus has no such split, or a shard is no readable Parquet file of a corpus.
    """
    shards = manifest.shards_of(split)
    total = sum(shard.records for shard in shards)
    if not total:
        raise SampleError(
            f"the corpus {manifest.name!r} has no split {split!r}; it has {sorted(manifest.splits)}"
        )
    families = {source.family for source in manifest.sources if source.splits.get(split)}  # type: ignore[call-overload]
    wanted = dict.fromkeys(sorted(families), total if total <= WHOLE else per_source)
    records = list(_first_of_each(store, shards, wanted))
    found = Counter(record["source_family"] for record in records)
    unreached = tuple(family for family in sorted(families) if not found[family])
    return Sample(split=split, records=records, total=total, unreached=unreached)


def _first_of_each(
    store: ObjectStore, shards: Sequence[Shard], wanted: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    missing = Counter(wanted)
    for shard in shards[:MOST_SHARDS]:
        if not +missing:
            return
        for record in _records(store, shard, missing):
            if missing[record["source_family"]] > 0:
                missing[record["source_family"]] -= 1
                yield record


def _records(store: ObjectStore, shard: Shard, missing: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of those row groups that may hold a source of which records are missing."""
    try:
        reader = io.BufferedReader(store.open(shard.key, ahead=False), buffer_size=1 << 20)
        file = pq.ParquetFile(reader, page_checksum_verification=True)
        column = file.schema_arrow.names.index("source_family")
        for group in range(file.metadata.num_row_groups):
            bounds = file.metadata.row_group(group).column(column).statistics
            needed = [family for family, count in missing.items() if count > 0]
            if bounds is None or any(bounds.min <= family <= bounds.max for family in needed):
                yield from file.read_row_group(group, columns=list(COLUMNS)).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's errors are among them
        raise SampleError(
            f"{store.uri(shard.key)} cannot be read as a shard of a corpus: {error}. Build the corpus again"
        ) from error


def tokenise_sample(sample: Sample, renderer: ChatRenderer, max_length: int | None) -> TokenSample:
    """Render every sampled record as training will, without cutting it.

    Raises:
        SampleError: not one record can be rendered; the message is the first record's.
    """
    rows, stages, faults = [], [], []
    records = [row for row in sample.records if row["target_role"] == renderer.target_role]
    for record, rendered in zip(records, _rendered(renderer, records), strict=True):
        if isinstance(rendered, RenderError):
            faults.append((record["content_hash"], str(rendered)))
        else:
            rows.append(rendered)
            stages.append(record["stage"])
    if not rows:
        reason = faults[0][1] if faults else f"none has the target role {renderer.target_role!r}"
        raise SampleError(f"none of {sample} can be rendered: {reason}")
    return TokenSample(rows=rows, stages=stages, faults=faults, max_length=max_length)


def _rendered(
    renderer: ChatRenderer, records: Sequence[Mapping[str, Any]]
) -> list[RenderedConversation | RenderError]:
    """As the renderer does it; a template that refuses a conversation (no system turn, say) is an error of its own."""
    from jinja2 import TemplateError

    try:
        return renderer.render_many([record["messages"] for record in records])
    except TemplateError:
        pass
    rendered: list[RenderedConversation | RenderError] = []
    for record in records:
        try:
            rendered.append(renderer.render(record["messages"]))
        except TemplateError as error:
            rendered.append(RenderError(f"the chat template refuses it: {error}"))
        except RenderError as error:
            rendered.append(error)
    return rendered
