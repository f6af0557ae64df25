"""May this conversation be trained on? Gates in a row: each lets a candidate pass or rejects it with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from training_ready.corpus.candidates import Candidate

Reason = Literal[
    "invalid_row", "empty", "license_missing", "license_not_allowed", "withheld_value", "duplicate"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Why a row is not in the corpus. ``detail`` never quotes its text."""

    reason: Reason
    detail: str


Gate = Callable[[Candidate], Rejection | None]


def corpus_gates(allowed_licenses: Iterable[str]) -> list[Gate]:
    """The gates of one build, in order. Duplicates come last: a copy that another gate rejected must not stand in the
    way of a good one."""
    return [reject_empty, license_gate(allowed_licenses), reject_withheld, duplicate_gate()]


def first_rejection(gates: Sequence[Gate], candidate: Candidate) -> Rejection | None:
    """The first gate's rejection, or None if all let the candidate pass."""
    for gate in gates:
        if rejection := gate(candidate):
            return rejection
    return None


def reject_empty(candidate: Candidate) -> Rejection | None:
    """No turn, a blank turn, or no turn of the role that is to be learned."""
    if not candidate.turns:
        return Rejection(reason="empty", detail="no turns")
    for index, turn in enumerate(candidate.turns):
        if not turn.content:
            return Rejection(reason="empty", detail=f"turn {index} ({turn.role}) is blank")
    target = candidate.facts.target_role
    if all(turn.role != target for turn in candidate.turns):
        return Rejection(reason="empty", detail=f"no turn of the target role {target!r}")
    return None


def license_gate(allowed: Iterable[str]) -> Gate:
    """Only conversations under one of these licences, compared without regard to letter case."""
    known = {tag.lower() for tag in allowed}

    def reject_license(candidate: Candidate) -> Rejection | None:
        tag = candidate.facts.license
        if tag is None:
            return Rejection(
                reason="license_missing", detail="neither the row nor its source states a licence"
            )
        if tag.lower() not in known:
            return Rejection(
                reason="license_not_allowed", detail=f"licence {tag!r:.60} is not in allowed_licenses"
            )
        return None

    return reject_license


def reject_withheld(candidate: Candidate) -> Rejection | None:
    """What the specification withholds (a person's name, say) must not stand in the text either."""
    if not candidate.withheld_columns:
        return None
    columns = ", ".join(candidate.withheld_columns)
    return Rejection(reason="withheld_value", detail=f"the text repeats what is withheld of {columns}")


def duplicate_gate() -> Gate:
    """Only the first of equal conversations: same roles, order and text, whatever their ids. 16 bytes each."""
    seen: set[bytes] = set()

    def reject_duplicate(candidate: Candidate) -> Rejection | None:
        digest = bytes.fromhex(candidate.content_hash.removeprefix("sha256:"))[:16]
        if digest in seen:
            return Rejection(reason="duplicate", detail=f"an earlier record has {candidate.content_hash}")
        seen.add(digest)
        return None

    return reject_duplicate
