"""Our own sections of a recipe: few, typed, each key with its help. TRL's flat keys stand beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Stage = Literal[
    "stage1_foundation", "stage2_therapeutic_expertise", "stage3_edge_stress_test", "stage4_voice_persona"
]
_REPOSITORY = r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$"


class Section(BaseModel):
    """A section: values are already typed when they arrive, unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataSection(Section):
    """Which corpus is learned, and whose turns."""

    corpus: str = Field(
        min_length=1,
        description="A built corpus: the key of its manifest in the bucket "
        "(`final_dataset/<name>/manifest.json`) or an `s3://` URI.",
    )
    train_split: str = Field("train", min_length=1, description="The split that is trained on.")
    eval_split: str | None = Field(
        None, min_length=1, description="The split of `eval_strategy`; null: none."
    )
    target_role: Literal["assistant", "user"] = Field(
        "assistant", description="Whose turns are learned: `assistant` is the therapist, `user` the client."
    )
    stages: list[Stage] | None = Field(
        None, min_length=1, description="Only rows of these curriculum stages; null: every row of the split."
    )


class StreamSection(Section):
    """How rows become packs."""

    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="A conversation longer than `max_length`: cut its end, leave it out, or stop the run. "
        "Each is counted.",
    )
    blocks_per_group: int = Field(
        8,
        ge=1,
        description="Blocks of rows shuffled and packed together; more mixes better and needs more memory.",
    )


class TokenizerSection(Section):
    """A tokenizer trained on the corpus, for a model from scratch."""

    vocab_size: int = Field(ge=258, description="Entries of the vocabulary, special tokens included.")
    chat_template: str = Field(
        "chatml", min_length=1, description="Name of a built-in chat template, or a Jinja file."
    )


class ModelSection(Section):
    """A model from scratch; excludes `model_name_or_path`."""

    config: dict[str, Any] | None = Field(
        None, description="A transformers configuration, `model_type` included; weights start random."
    )
    tokenizer: TokenizerSection | None = Field(None, description="The tokenizer of a model from scratch.")


class MoeSection(Section):
    """Mixture of experts."""

    watch: bool = Field(
        True, description="Record the load and entropy of every router; no effect on a dense model."
    )


class BudgetSection(Section):
    """What the run may cost."""

    max_hours: float | None = Field(
        None,
        gt=0,
        description="Wall-clock hours after which the run saves and stops cleanly; null: no limit.",
    )


class ReleaseSection(Section):
    """What leaves the house, and what its card says."""

    repo_id: str | None = Field(None, pattern=_REPOSITORY, description="Repository on the hub: `owner/name`.")
    private: bool = Field(True, description="Create the repository private.")
    license: str | None = Field(
        None, min_length=1, description="Licence of the released weights (SPDX or hub id)."
    )
    language: list[str] = Field(["en"], min_length=1, description="Languages of the model, as ISO 639 codes.")
    tags: list[str] = Field([], description="Further tags of the card.")
    summary: str | None = Field(None, min_length=1, description="What the model is, in a sentence or two.")
    intended_use: str | None = Field(None, min_length=1, description="What it is for, and who may use it.")
    limits: str | None = Field(
        None, min_length=1, description="What it must not be used for; known weaknesses."
    )


class OvhSection(Section):
    """One job on OVHcloud AI Training."""

    image: str = Field(min_length=1, description="Container image, with tag or digest.")
    flavor: str = Field(
        min_length=1, description="Flavour of the machine, as `ovhai capabilities flavor list` names it."
    )
    gpus: int = Field(1, ge=1, description="GPUs of that flavour.")
    region: str = Field(min_length=1, description="OVHcloud region of the job and its buckets.")
    timeout_hours: float | None = Field(
        None, gt=0, description="The platform kills the job after this; null: never."
    )
    env: dict[str, str] = Field({}, description="Environment of the job; never secrets.")
    volumes: list[str] = Field([], description="Volumes in the syntax of `ovhai job run --volume`.")


class LaunchSection(Section):
    """Where and on how many processes it runs."""

    accelerate_config: str | None = Field(
        None, min_length=1, description="A shipped topology by name (`fsdp2`) or an accelerate file by path."
    )
    num_processes: int | None = Field(
        None, ge=1, description="Processes of the run; null: what the topology says."
    )
    ovh: OvhSection | None = Field(None, description="The job on OVHcloud; null: this machine.")


SECTIONS: dict[str, type[Section]] = {
    "data": DataSection,
    "stream": StreamSection,
    "model": ModelSection,
    "moe": MoeSection,
    "budget": BudgetSection,
    "release": ReleaseSection,
    "launch": LaunchSection,
}
"""Every section by the name of its key, in the order of a written recipe."""
