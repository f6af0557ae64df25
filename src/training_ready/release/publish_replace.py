"""May a publication replace what `main` holds? An earlier release of the same run; anything else when asked to."""

from __future__ import annotations

from pydantic import ValidationError

from training_ready.release.connection import Journey, PublishError
from training_ready.release.record import RECORD, ReleaseRecord


def refuse_another(journey: Journey, where: str, found: bytes | None, files: int, new: ReleaseRecord) -> None:
    """Refuse to publish `new` over another model's release, or over what is no release at all.

    Args:
        where: how a message calls the target.
        found: the release.json that `main` holds; None when there is none.
        files: how many files `main` holds.

    Raises PublishError saying what is there.
    """
    facts = new.facts
    ours = identity(facts.run, facts.model.base_model, facts.data.target_role)
    said = holds_another(found, files, ours)
    if said is not None:
        journey.again += " --replace"
        raise PublishError(
            f"main of {where} holds {said}. Nothing was sent. Choose another name, or replace it on purpose."
        )


def identity(run: str, base_model: str | None, target_role: str) -> dict[str, str]:
    """What two releases of one model have in common."""
    return {"run": run, "base": base_model or "none, from scratch", "role": target_role}


def holds_another(found: bytes | None, files: int, ours: dict[str, str]) -> str | None:
    """What `main` holds, in words; None where that is nothing, or an earlier release of the same model."""
    if not files:
        return None
    try:
        facts = ReleaseRecord.model_validate_json(found or b"").facts
    except ValidationError:
        return f"{files} file{'s' * (files != 1)} without a {RECORD} that can be read"
    there = identity(facts.run, facts.model.base_model, facts.data.target_role)
    others = [f"{what} {there[what]!r} (here {ours[what]!r})" for what in ours if there[what] != ours[what]]
    return f"the release of another model: {', '.join(others)}" if others else None
