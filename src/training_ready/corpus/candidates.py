"""What does this row claim to be? Turns, typed facts and group of one row, before any gate has judged it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic import Field, ValidationError

from training_ready.corpus.adapters import InvalidRow, map_row, plain_text, recognised_form
from training_ready.corpus.readers import Row, SourceError, Table
from training_ready.corpus.record import (
    Closed,
    Component,
    Crisis,
    Domain,
    NonBlank,
    Split,
    Stage,
    TargetRole,
    Turn,
    canonical_json,
    content_hash,
)
from training_ready.corpus.spec import Source

_CRISIS_STAGE: Stage = "stage3_edge_stress_test"
_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Facts(Closed):
    """What a source or one of its rows states about a conversation."""

    stage: Stage
    target_role: TargetRole
    license: NonBlank | None = None
    domain: Domain | None = None
    language: NonBlank | None = None
    crisis: Crisis | None = None
    components: list[Component] = Field(default_factory=list)
    persona_id: NonBlank | None = None
    voice_signature: NonBlank | None = None
    quality_score: float | None = None
    bias_flags: list[str] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One row understood. ``groups`` are 16-byte digests; rows that share one belong in the same split."""

    position: str
    turns: list[Turn]
    content_hash: str
    facts: Facts
    extra: dict[str, str]
    groups: tuple[bytes, ...]
    family: str
    publisher_split: Split | None
    withheld_columns: tuple[str, ...]
    unused: frozenset[str]
    """Fields of the row that reach no part of the record."""

    @property
    def concerns_crisis(self) -> bool:
        return self.facts.crisis is not None or self.facts.stage == _CRISIS_STAGE


@dataclass(frozen=True, kw_only=True, slots=True)
class Unusable:
    """One row that is no candidate, and why. Never holds the row's text."""

    position: str
    why: str
    concerns_crisis: bool
    """The source or the row says so: its loss must be seen by a person."""


def candidates(table: Table, source: Source, key: str) -> Iterator[Candidate | Unusable]:
    """Every row of ``table``, as one or the other. Raises :class:`SourceError` if a mapped column is not there."""
    if table.columns is not None:
        _require_columns(table.columns, source, key)
    known = source.mapped_columns().keys() | set(source.row_fields)
    for row in table.rows:
        try:
            yield _candidate(row, source, known)
        except InvalidRow as error:
            yield Unusable(
                position=row.position, why=str(error), concerns_crisis=_speaks_of_crisis(row.value, source)
            )


def _require_columns(present: tuple[str, ...], source: Source, key: str) -> None:
    named = source.mapped_columns() | dict.fromkeys(source.row_fields, "row_fields")
    missing = [column for column in named if column not in present]
    listed = ", ".join(repr(column) for column in present if column)
    if missing:
        faults = []
        for column in missing:
            near = get_close_matches(column, [name for name in present if name], 1)
            faults.append(
                f"{named[column]} names the column {column!r}" + (f" (nearest: {near[0]!r})" if near else "")
            )
        raise SourceError(
            f"{key}: source {source.name!r}: {'; '.join(faults)}, which is not there. The columns are {listed}. "
            "Correct the specification"
        )
    if source.columns is None and source.form == "auto" and recognised_form(present) is None:
        raise SourceError(
            f"{key}: source {source.name!r}: no known form of conversation in the columns {listed}. Say which hold the "
            "client's and the therapist's words: columns: {user: …, assistant: …}"
        )


def _candidate(row: Row, source: Source, known: Set[str]) -> Candidate:
    if row.value is None:
        raise InvalidRow(row.problem)
    value = row.value
    mapped = map_row(value, columns=source.columns, form=source.form)
    turns = mapped.turns
    digest = content_hash(turns)
    return Candidate(
        position=row.position,
        turns=turns,
        content_hash=digest,
        facts=_facts(value, source),
        extra=_extra(value, source),
        groups=_groups(value, source, digest),
        family=source.source_family,
        publisher_split=_publisher_split(value, source),
        withheld_columns=_withheld(value, source, turns),
        unused=frozenset(value.keys() - mapped.used - known - {""}),
    )


def _facts(value: Mapping[str, object], source: Source) -> Facts:
    given = {
        name: stated
        for name in ("stage", "target_role", "license", "domain", "language")
        if (stated := getattr(source, name)) is not None
    }
    stated = {name: value[name] for name in source.row_fields if value.get(name) not in (None, "")}
    roles = [facts["target_role"] for facts in (stated, given) if "target_role" in facts]
    if len(roles) == 2 and roles[0] != roles[1]:
        raise InvalidRow(f"the row's target role is {roles[0]!r:.20}, its source's {roles[1]!r}")
    try:
        return Facts.model_validate(given | stated)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise InvalidRow(faults) from None


def _extra(value: Mapping[str, object], source: Source) -> dict[str, str]:
    extra: dict[str, str] = {}
    for name, column in source.metadata.items():
        held = value.get(column)
        text = plain_text(held if held is None or isinstance(held, str) else canonical_json(held), column)
        if text:
            extra[name] = text
    return extra


def _groups(value: Mapping[str, object], source: Source, digest: str) -> tuple[bytes, ...]:
    if not source.group_by:
        return (bytes.fromhex(digest.removeprefix("sha256:"))[:16],)
    groups = []
    for column in source.group_by:
        held = value.get(column)
        text = " ".join(plain_text(str(held) if isinstance(held, int) else held, column).casefold().split())
        if text:
            groups.append(hashlib.sha256("\0".join((source.name, column, text)).encode()).digest()[:16])
    if not groups:
        raise InvalidRow(f"nothing in {' or '.join(source.group_by)}, which group_by names")
    return tuple(groups)


def _publisher_split(value: Mapping[str, object], source: Source) -> Split | None:
    if source.split_column is None:
        return None
    word = plain_text(value.get(source.split_column), source.split_column).lower()
    if word and word not in _SPLIT_WORDS:
        raise InvalidRow(
            f"{source.split_column} holds {word!r:.20}, which is no split; known are {sorted(_SPLIT_WORDS)}"
        )
    return _SPLIT_WORDS.get(word)


def _withheld(value: Mapping[str, object], source: Source, turns: list[Turn]) -> tuple[str, ...]:
    """Columns whose content, as far as their expression finds it, occurs in the conversation."""
    if not source.withhold:
        return ()
    said = "\n".join(turn.content for turn in turns).casefold()
    found = []
    for column, pattern in source.withhold.items():
        secrets = (
            match.group().casefold() for match in re.finditer(pattern, plain_text(value.get(column), column))
        )
        if any(secret.strip() and secret.strip() in said for secret in secrets):
            found.append(column)
    return tuple(found)


def _speaks_of_crisis(value: Mapping[str, object] | None, source: Source) -> bool:
    row = value or {}
    return _CRISIS_STAGE in (source.stage, row.get("stage")) or bool(row.get("crisis"))
