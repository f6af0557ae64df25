"""What is one record? The typed conversation that every later room reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

Role = Literal["system", "user", "assistant"]
TargetRole = Literal["assistant", "user"]
Split = Literal["train", "val", "test"]
Stage = Literal[
    "stage1_foundation", "stage2_therapeutic_expertise", "stage3_edge_stress_test", "stage4_voice_persona"
]
Domain = Literal["psychology", "mental_health", "bias_detection", "general_therapeutic"]
PiiStatus = Literal["scrubbed", "none_detected", "requires_review"]
CrisisLevel = Literal["emergency", "critical", "elevated", "routine"]
CrisisType = Literal[
    "suicide_ideation",
    "self_harm",
    "violence_threat",
    "psychotic_episode",
    "substance_overdose",
    "domestic_violence",
    "child_abuse",
    "severe_depression",
    "panic_attack",
    "eating_disorder_crisis",
]
Component = Literal[
    "journaling_system",
    "voice_blending",
    "edge_case_handling",
    "dual_persona_dynamics",
    "bias_detection",
    "psychology_knowledge_base",
]

SPLITS: tuple[Split, ...] = get_args(Split)
STAGES: tuple[Stage, ...] = get_args(Stage)
"""In curriculum order. When two sources hold the same conversation, the later stage keeps its copy."""

NonBlank = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
ObjectDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Closed(BaseModel):
    """A border: unknown fields are errors, and a value once made does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(Closed):
    """One turn. ``assistant`` is always the therapist and ``user`` always the client, whoever is learned."""

    role: Role
    content: NonBlank


class Turn(NamedTuple):
    """A turn on its way to be a message: the text may still be blank."""

    role: Role
    content: str


class Provenance(Closed):
    """Where a record came from and what was done to it, in order."""

    original_s3_key: NonBlank
    pipeline_version: NonBlank
    processed_at: AwareDatetime
    steps: list[str]


class Crisis(Closed):
    """A crisis marker: it asks for a human's review and never causes a silent rejection."""

    level: CrisisLevel
    type: CrisisType


class RecordMetadata(Closed):
    """Everything known about a record except its text.

    ``source_family`` groups sources (the unit of a hold-out); ``source_key`` names the row: object key, ``#``,
    position. ``pii_status`` is ``requires_review`` unless something checked the text, or its source declares more.
    ``total_tokens`` stays empty until a tokenizer has counted; words are never reported as tokens.
    ``extra`` holds what a source's specification asked to keep (topic, ids), as text.
    """

    source_family: NonBlank
    source_key: NonBlank
    content_hash: Sha256
    pii_status: PiiStatus
    license_tag: NonBlank
    split: Split
    stage: Stage
    target_role: TargetRole
    provenance: Provenance
    conversation_length: int | None = Field(default=None, ge=1)
    total_tokens: int | None = Field(default=None, ge=1)
    quality_score: float | None = Field(default=None, ge=0, le=1)
    bias_flags: list[str] = []
    crisis: Crisis | None = None
    components: list[Component] = []
    persona_id: NonBlank | None = None
    voice_signature: NonBlank | None = None
    language: NonBlank | None = None
    domain: Domain | None = None
    extra: dict[str, str] = {}

    def canonical_json(self) -> str:
        """The one text of this metadata: sorted keys, no blanks, absent values left out."""
        return canonical_json(self.model_dump(mode="json", exclude_defaults=True))


class Record(Closed):
    """One conversation with its metadata. The content hash must be the hash of these very messages."""

    messages: list[Message] = Field(min_length=1)
    metadata: RecordMetadata

    @model_validator(mode="after")
    def _hash_is_of_these_messages(self) -> Record:
        found = content_hash(self.messages)
        if self.metadata.content_hash != found:
            raise ValueError(
                f"content_hash is {self.metadata.content_hash}, but the messages hash to {found}: "
                "the text was changed after it was hashed"
            )
        return self


def content_hash(messages: Sequence[Message] | Sequence[Turn]) -> str:
    """``sha256:<64 hex>`` over roles, order and text.

    Hashes a JSON array of [role, content] pairs: quoting makes the borders between turns unambiguous, and nothing is
    sorted, so two conversations share a hash only if they are the same conversation.
    """
    pairs = [[message.role, message.content] for message in messages]
    return "sha256:" + hashlib.sha256(canonical_json(pairs).encode()).hexdigest()


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
