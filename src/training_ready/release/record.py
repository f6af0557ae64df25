"""What does a release know about itself? `release.json`: facts, words and engines, from which its card is written.

It is written by `release build` and travels with the weights, so that a card can be written again when an engine was
verified, and so that nothing is published whose card would have to invent a field.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training_ready.release.facts import CardError, RunFacts, Text, faults_of
from training_ready.storage.durable import write_durably

RECORD = "release.json"


class Words(BaseModel):
    """The recipe's `release:` section, as far as a card needs it; every text is required."""

    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True)

    license: Text
    language: Annotated[Sequence[str], Field(min_length=1)]
    tags: Sequence[str]
    summary: Text
    intended_use: Text
    limits: Text


class ReleaseRecord(BaseModel):
    """All that a card says, but for the files beside it and the engines that were tried since."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    title: Text
    facts: RunFacts
    words: Words
    chat_template: Text
    end_of_turn: dict[int, str]
    """Token id to token, of those that end an answer."""
    special_tokens: dict[str, str]
    """What the tokenizer calls it (`bos_token`) to its characters."""

    @property
    def branch(self) -> str:
        """What the release is called by its place in training."""
        return f"step-{self.facts.steps:06d}"


def write_record(folder: Path, record: ReleaseRecord) -> None:
    write_durably(folder / RECORD, record.model_dump_json(indent=1) + "\n")


def read_record(folder: Path) -> ReleaseRecord:
    """Raises CardError naming every required field that is missing or wrong."""
    path = folder / RECORD
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CardError(
            f"{path} is missing: the card is written from it. Build the release again (training-ready release build); "
            "of an adapter, export the checkpoint again in the folder of its finished run."
        ) from error
    except ValueError as error:
        raise CardError(f"{path} is not JSON: {error}") from error
    try:
        return ReleaseRecord.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise CardError(f"{path} lacks what the card requires:\n  {faults_of(error)}") from error
