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
from training_ready.check.corpora import Corpus, Origin
from training_ready.corpus.manifest import Shard
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
    """``records`` are rows of corpora as dictionaries, each with its ``origin``; ``totals`` the sizes of the splits."""

    records: list[dict[str, Any]]
    totals: Mapping[Origin, int]
    unreached: tuple[str, ...] = ()
    """Source families of which no record was found in the shards that were opened."""

    @property
    def whole(self) -> bool:
        return len(self.records) == sum(self.totals.values())

    def scale(self, origin: Origin) -> float:
        """Records of a split for each that was sampled."""
        return self.totals[origin] / sum(1 for record in self.records if record["origin"] == origin)

    def __str__(self) -> str:
        splits = ", ".join(dict.fromkeys(split for _, split in self.totals))
        return f"{len(self.records):,} of {sum(self.totals.values()):,} records of {splits}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSample:
    """The sampled records as tokens, uncut: ``rows[i]`` is ``records[i]``; ``faults`` could not be rendered."""

    rows: list[RenderedConversation]
    records: list[dict[str, Any]]
    faults: list[tuple[str, str]]
    """(content hash, reason)."""
    max_length: int | None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(row.input_ids) for row in self.rows], dtype=np.int64)


def read_sample(corpora: Mapping[str, Corpus], splits: Sequence[Origin], per_source: int) -> Sample:
    """Up to ``per_source`` records of each source family of each split; a small split whole.

    Raises:
        SampleError: a corpus has no such split, or a shard is no readable Parquet file of a corpus.
    """
    records, totals, unreached = [], {}, []
    for origin in splits:
        corpus, split = corpora[origin[0]], origin[1]
        total = sum(shard.records for shard in corpus.shards(split))
        if not total:
            raise SampleError(
                f"the corpus {corpus.manifest.name!r} has no split {split!r}; it has "
                f"{sorted(corpus.manifest.splits)}"
            )
        totals[origin] = total
        families = {s.family for s in corpus.manifest.sources if dict(s.splits).get(split)}  # type: ignore[call-overload]
        wanted = dict.fromkeys(sorted(families), total if total <= WHOLE else per_source)
        found = [
            {**row, "origin": origin} for row in _first_of_each(corpus.store, corpus.shards(split), wanted)
        ]
        records += found
        unreached += sorted(families - {row["source_family"] for row in found})
    return Sample(records=records, totals=totals, unreached=tuple(unreached))


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
        # Messages are two columns of the file, so its numbers are not those of the table.
        column = next(i for i, one in enumerate(file.schema) if one.path == "source_family")
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
    rows, kept, faults = [], [], []
    records = [row for row in sample.records if row["target_role"] == renderer.target_role]
    for record, rendered in zip(records, _rendered(renderer, records), strict=True):
        if isinstance(rendered, RenderError):
            faults.append((record["content_hash"], str(rendered)))
        else:
            rows.append(rendered)
            kept.append(record)
    if not rows:
        reason = faults[0][1] if faults else f"none has the target role {renderer.target_role!r}"
        raise SampleError(f"none of {sample} can be rendered: {reason}")
    return TokenSample(rows=rows, records=kept, faults=faults, max_length=max_length)


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
