"""What becomes of every row? Each goes to a shard or to the list of rejected rows, and is counted once.

::

    inputs ─► candidates ─► gates ─► split ─► shards
                              └────► rejected.jsonl

Sources with groups to join or a publisher's split are read twice: the first pass learns the splits. Memory holds one
row group per split, 16 bytes per record for the duplicate gate, and some 200 bytes per group of such a source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from training_ready import TrainingReadyError
from training_ready.corpus.candidates import Candidate, Unusable
from training_ready.corpus.gates import Rejection, corpus_gates, first_rejection
from training_ready.corpus.inputs import Input
from training_ready.corpus.manifest import Shard, SourceCounts, StoredObject
from training_ready.corpus.record import SPLITS, STAGES, Message, Provenance, Record, RecordMetadata, Split
from training_ready.corpus.shards import ShardWriter, put_verified
from training_ready.corpus.spec import CorpusSpec, Source
from training_ready.corpus.split import SplitPlan
from training_ready.storage.objects import ObjectStore


class BuildError(TrainingReadyError):
    """The corpus was not built; no finished corpus was touched."""


class Progress(Protocol):
    """What a build tells while it runs: bytes of input, pass by pass."""

    def begin(self, what: str, total: int) -> None: ...
    def advance(self, done: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembled:
    """All rows, written and counted."""

    sources: list[SourceCounts]
    stages: dict[str, int]
    target_roles: dict[str, int]
    shards: list[Shard]
    rejected_rows: StoredObject | None


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What became of one source's rows so far."""

    records_in: int = 0
    kept: int = 0
    moved: int = 0
    crisis_rejected: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    splits: Counter[Split] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    unused_fields: set[str] = field(default_factory=set)

    def counts(self, source: Source) -> SourceCounts:
        """Raises :class:`BuildError` if the source gave nothing: a corpus without it is not what was asked for."""
        if not self.records_in:
            raise BuildError(f"source {source.name!r} is empty: no row in {', '.join(source.path)}")
        if not self.kept and not source.may_reject_all:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.most_common())
            raise BuildError(
                f"source {source.name!r}: none of its {self.records_in} rows was kept ({reasons}). Correct the "
                "source, or its part of the specification"
            )
        return SourceCounts(
            name=source.name,
            family=source.source_family,
            records_in=self.records_in,
            kept=self.kept,
            rejected=dict(sorted(self.rejected.items())),
            splits={split: self.splits[split] for split in SPLITS},
            licenses=dict(sorted(self.licenses.items())),
            moved=self.moved,
            crisis_rejected=self.crisis_rejected,
            unused_fields=sorted(self.unused_fields),
            pii_status=source.pii_status,
            consent=source.consent,
        )


class Assembly:
    """One corpus under way: gates, split plan, shard writers and tallies of one build."""

    def __init__(
        self,
        spec: CorpusSpec,
        store: ObjectStore,
        folder: Path,
        *,
        prefix: str,
        suffix: str,
        pipeline_version: str,
        processed_at: datetime,
        progress: Progress,
    ) -> None:
        """
        Args:
            folder: local folder for what is not yet uploaded.
            prefix: key of the corpus, with its final slash.
            suffix: ends the name of every object, so that none of an earlier corpus is overwritten.
        """
        self._spec, self._store = spec, store
        self._pipeline_version, self._processed_at, self._progress = pipeline_version, processed_at, progress
        self._plan = SplitPlan(spec.splits, seed=spec.seed, holdout_families=spec.holdout_families)
        self._gates = corpus_gates(spec.allowed_licenses)
        self._tallies = {source.name: _Tally() for source in spec.sources}
        self._stages: Counter[str] = Counter()
        self._target_roles: Counter[str] = Counter()
        self._rejects = _RejectedRows(folder / "rejected.jsonl", f"{prefix}rejected{suffix}.jsonl")
        self._writers = {
            split: ShardWriter(
                store,
                folder,
                prefix=prefix,
                split=split,
                suffix=suffix,
                row_group_records=spec.row_group_records,
                shard_records=spec.shard_records,
            )
            for split in SPLITS
        }

    def run(self, inputs: Sequence[Input]) -> Assembled:
        """Reads every input and writes every object but the manifest."""
        self._learn_splits([one for one in inputs if one.source.split_column or len(one.source.group_by) > 1])
        # Where two sources hold the same conversation, the one of the later stage comes first and keeps it.
        ranked = sorted(inputs, key=lambda one: -STAGES.index(one.source.stage) if one.source.stage else 0)
        self._progress.begin("building", sum(one.size for one in ranked))
        for origin, row in self._rows(ranked):
            self._take(origin, row)
        sources = [self._tallies[source.name].counts(source) for source in self._spec.sources]
        return Assembled(
            sources=sources,
            stages={stage: self._stages[stage] for stage in STAGES},
            target_roles=dict(sorted(self._target_roles.items())),
            shards=[shard for split in SPLITS for shard in self._writers[split].close()],
            rejected_rows=self._rejects.upload(self._store),
        )

    def _learn_splits(self, inputs: Sequence[Input]) -> None:
        if inputs:
            self._progress.begin("grouping", sum(one.size for one in inputs))
        for _, row in self._rows(inputs):
            if isinstance(row, Candidate):
                self._plan.observe(row)

    def _rows(self, inputs: Sequence[Input]) -> Iterator[tuple[Input, Candidate | Unusable]]:
        for one in inputs:
            for row in one.read(self._progress.advance):
                yield one, row

    def _take(self, origin: Input, row: Candidate | Unusable) -> None:
        """One row goes to exactly one of the shards and the rejected rows."""
        tally = self._tallies[origin.source.name]
        tally.records_in += 1
        if isinstance(row, Candidate):
            tally.unused_fields |= row.unused
            rejection = first_rejection(self._gates, row)
            if rejection is None:
                self._keep(origin, row, tally)
                return
        else:
            rejection = Rejection(reason="invalid_row", detail=row.why)
        tally.rejected[rejection.reason] += 1
        tally.crisis_rejected += row.concerns_crisis
        self._rejects.add(origin, row, rejection)

    def _keep(self, origin: Input, candidate: Candidate, tally: _Tally) -> None:
        split = self._plan.split_of(candidate)
        record = self._record(origin, candidate, split)
        self._writers[split].add(record)
        tally.kept += 1
        tally.splits[split] += 1
        tally.licenses[record.metadata.license_tag] += 1
        tally.moved += candidate.publisher_split not in (None, split)
        self._stages[record.metadata.stage] += 1
        self._target_roles[record.metadata.target_role] += 1

    def _record(self, origin: Input, candidate: Candidate, split: Split) -> Record:
        facts = candidate.facts.model_dump(exclude={"license"})
        steps = ["text normalised", f"gates passed: {', '.join(gate.__name__ for gate in self._gates)}"]
        if candidate.publisher_split == split:
            steps.append("split: the publisher's")
        elif candidate.family in self._spec.holdout_families:
            steps.append("split: hold-out family")
        else:
            steps.append("split: the group's")
        steps.append(
            f"pii_status: {origin.source.pii_status}, "
            + ("as its source declares" if origin.source.pii_status != "requires_review" else "not checked")
        )
        return Record(
            messages=[Message(role=turn.role, content=turn.content) for turn in candidate.turns],
            metadata=RecordMetadata(
                source_family=candidate.family,
                source_key=f"{origin.key}#{candidate.position}",
                content_hash=candidate.content_hash,
                pii_status=origin.source.pii_status,
                license_tag=candidate.facts.license or "",  # the gates let no candidate without one pass
                split=split,
                provenance=Provenance(
                    original_s3_key=origin.key,
                    pipeline_version=self._pipeline_version,
                    processed_at=self._processed_at,
                    steps=steps,
                ),
                conversation_length=len(candidate.turns),
                extra=candidate.extra,
                **facts,
            ),
        )


class _RejectedRows:
    """Where every rejected row stands and why, one JSON line each, without its text."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._records = path, key, 0

    def add(self, origin: Input, row: Candidate | Unusable, rejection: Rejection) -> None:
        line = {
            "source": origin.source.name,
            "uri": origin.uri,
            "position": row.position,
            "reason": rejection.reason,
            "detail": rejection.detail,
            "concerns_crisis": row.concerns_crisis,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._records += 1

    def upload(self, store: ObjectStore) -> StoredObject | None:
        if not self._records:
            return None
        size, digest = put_verified(store, self._key, self._path)
        return StoredObject(key=self._key, bytes=size, sha256=digest, records=self._records)
