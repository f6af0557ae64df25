"""Our own sections of a recipe: few, typed, each key with its help. TRL's flat keys stand beside them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

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


class MixturePart(Section):
    """Rows that share a weight."""

    corpus: str | None = Field(
        None, min_length=1, description="Manifest of their corpus; null: `data.corpus`."
    )
    split: str | None = Field(None, min_length=1, description="Their split; null: `data.train_split`.")
    sources: list[str] | None = Field(None, min_length=1, description="Rows of these source families only.")
    stages: list[Stage] | None = Field(None, min_length=1, description="Rows of these stages only.")
    components: list[str] | None = Field(
        None, min_length=1, description="Rows with one of these component annotations only."
    )
    weight: float | None = Field(
        None, ge=0, description="Share of the mixture; null in all parts: their own sizes."
    )
    max_epochs: float | None = Field(
        None, gt=0, description="Passes after which the part is used up and the others take its place."
    )


class CurriculumStep(Section):
    """The weights of the mixture from a step on."""

    from_step: int = Field(ge=1, description="The first optimizer step (0 is the first of the run).")
    weights: dict[str, float] = Field(description="New weights by part; the others keep theirs.")


class StreamSection(Section):
    """How rows become packs, and in which order."""

    mixture: dict[str, MixturePart] | None = Field(
        None,
        min_length=1,
        description="Parts of corpora by name, each `{corpus, split, sources, stages, components, weight, "
        "max_epochs}`, all optional; null: `data.corpus` alone.",
    )
    mixture_by: Literal["tokens", "rows"] = Field(
        "tokens", description="What the weights of the mixture are shares of."
    )
    temperature: float = Field(
        1.0, gt=0, description="Weights become weight ** (1 / temperature); above 1 evens parts out."
    )
    curriculum: list[CurriculumStep] | None = Field(
        None,
        min_length=1,
        description="Later mixtures, each `{from_step, weights: {part: weight}}`, in the order of their steps.",
    )
    overlong: Literal["truncate", "split_turns", "drop", "error"] = Field(
        "truncate",
        description="A conversation longer than `max_length`: cut its end, make several rows of it between turns, "
        "leave it out, or stop the run. Each is counted.",
    )
    max_truncated: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of the rows and of the tokens that `overlong` may cost; above it the check fails.",
    )
    blocks_per_group: int = Field(
        8,
        ge=1,
        description="Blocks of rows shuffled and packed together; more mixes better and needs more memory.",
    )
    lanes: int | None = Field(
        None,
        ge=1,
        description="Stretches of an epoch that are read side by side; ranks share them out. It must divide the "
        "global batch; null: the largest divisor up to 16.",
    )
    early_start: bool = Field(
        True,
        description="With max_steps and no mixture: begin when the first rows are tokenised. The first pass then reads "
        "the blocks in rounds of 1, 1, 2, 4, …; false mixes the whole corpus from its first step on.",
    )
    tokenise_workers: int | None = Field(
        None,
        ge=1,
        description="Processes in which each rank tokenises what no run has tokenised before; null: the machine's "
        "cores, shared by its ranks. Small corpora are done in the rank itself.",
    )
    resume_allow: list[
        Literal[
            "manifests",
            "tokens",
            "global_batch",
            "mixture",
            "overlong",
            "max_length",
            "packing",
            "seed",
            "blocks_per_group",
            "lanes",
            "early_start",
        ]
    ] = Field(
        [],
        description="What may have changed since the checkpoint that a run continues from; its position then counts "
        "in the new order, so rows may come twice or not at all in the epoch that is open.",
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


class ExpertAdaptersSection(Section):
    """Low-rank adapters on the experts, beside `use_peft` for the other layers; the experts stay frozen."""

    rank: int = Field(ge=1, description="Rank of each expert's adapters; with `use_peft` equal to `lora_r`.")
    alpha: float = Field(
        gt=0, description="Scale, divided by the rank; with `use_peft` equal to `lora_alpha`."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapters' inputs while training.")
    projections: list[Literal["gate_up_proj", "down_proj"]] = Field(
        ["gate_up_proj", "down_proj"],
        min_length=1,
        description="Which of an expert's projections are adapted.",
    )


class SharedBaseSection(Section):
    """Experts over one dense base, which stays frozen: a low-rank difference per expert and the routers train."""

    experts: int = Field(ge=2, description="Experts of every layer.")
    top_k: int = Field(
        2,
        ge=2,
        description="Experts that compute each token; one alone would leave its router without gradient.",
    )
    rank: int = Field(ge=1, description="Rank of each expert's difference from the base.")
    alpha: float = Field(gt=0, description="Scale of the differences, divided by the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the differences' inputs while training.")
    start: str | None = Field(
        None,
        min_length=1,
        description="Folder `4-mix` of `training-ready moe upcycle`: branches and router rows to start from. null: no "
        "difference, random routers.",
    )


class MoeSection(Section):
    """Mixture of experts; no effect on a dense model, unless said otherwise."""

    watch: bool = Field(
        True, description="Record the load and entropy of every router; no effect on a dense model."
    )
    warn_min_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Warn when an expert's share of its layer's tokens since the last log is below this; an even "
        "share is 1 / experts.",
    )
    stop_on_dead_steps: int | None = Field(
        None,
        ge=1,
        description="Stop the run when an expert has got no token for so many steps, seen at every log.",
    )
    balance_coefficient: float | None = Field(
        None,
        ge=0,
        description="Weight of the load-balancing loss per layer over the global batch (1.0 when balanced, E when "
        "collapsed). null: the model's own coefficient x experts per token, which means the same, if the routers "
        "train; else 0. 0: off.",
    )
    balance_counts: Literal["window", "exact"] = Field(
        "window",
        description="How the load of a step is known before its last micro-batch. window: the last micro-batches, "
        "as many as a step has. exact: a forward without gradients first, a third more compute; the same "
        "gradients for every split of a batch.",
    )
    z_loss: float = Field(
        0.0, ge=0, description="Weight of the mean squared logsumexp of the router logits; 0: off."
    )
    bias_rate: float = Field(
        0.001,
        ge=0,
        description="Step of the choice bias of families that are balanced by one (deepseek_v3 ...), after each "
        "optimizer step of a full fine-tuning; 0: the biases stay.",
    )
    fp32_router: bool = Field(
        False, description="Compute router logits in fp32 whatever the weights' type; costs next to nothing."
    )
    adapters: ExpertAdaptersSection | None = Field(
        None, description="Adapters on the experts; refused for a dense model. null: none."
    )
    shared_base: SharedBaseSection | None = Field(
        None,
        description="Make a dense model a mixture of experts that share its weights; released as a plain Mixtral or "
        "Qwen3-MoE. With `use_peft` the attention learns beside them. null: the model as it is.",
    )
    experts_4bit: Literal["nf4", "nf4_double"] | None = Field(
        None,
        description="Hold the frozen experts in NF4 (4.5 bits per weight; double: 4.13) while adapters train. null: as "
        "loaded.",
    )


class CheckpointSection(Section):
    """Where checkpoints live besides the run folder; `save_steps` and `save_total_limit` say when and how many."""

    mirror: bool | str = Field(
        False,
        description="Copy each complete checkpoint to the bucket in the background, so that any machine can go on "
        "from it. true: `runs/<run_name>/` in the bucket of checkpoints (`OVH_S3_CHECKPOINT_BUCKET`); an `s3://` "
        "address: below that.",
    )
    keep_remote: int | None = Field(
        None, ge=1, description="Newest checkpoints that stay in the bucket; null: all of them."
    )
    patience_minutes: float = Field(
        15.0,
        gt=0,
        description="Minutes without any success at the bucket after which a checkpoint's upload is given up. Training "
        "goes on; the run fails at its end if the last one is not in the bucket.",
    )

    @field_validator("mirror")
    @classmethod
    def _address(cls, mirror: bool | str) -> bool | str:
        if isinstance(mirror, str) and not re.fullmatch(r"s3://[^/]+/.+", mirror):
            raise ValueError("expected true, false or an address such as s3://bucket/prefix")
        return mirror


class BudgetSection(Section):
    """What the run may cost."""

    max_hours: float | None = Field(
        None,
        gt=0,
        description="Wall-clock hours after which the run saves and stops cleanly; null: no limit.",
    )
    price_per_hour: float | None = Field(
        None,
        gt=0,
        description="Price of one hour of all machines of the run, in your currency; the check multiplies it with the "
        "hours it expects. Null: unknown.",
    )


class ReleaseSection(Section):
    """What leaves the house, and what its card says."""

    repo_id: str | None = Field(None, pattern=_REPOSITORY, description="Repository on the hub: `owner/name`.")
    target: Literal["hf", "vllm", "tgi", "gguf", "ollama", "adapter"] = Field(
        "hf",
        description="What will serve the release: transformers, vLLM, TGI 3.3.7, llama.cpp, ollama, or an engine that "
        "adds the adapter to its base.",
    )
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
    gpu_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of one GPU in GiB, for `training-ready check`; null: that of `launch.ovh.flavor`.",
    )
    ovh: OvhSection | None = Field(None, description="The job on OVHcloud; null: this machine.")


SECTIONS: dict[str, type[Section]] = {
    "data": DataSection,
    "stream": StreamSection,
    "model": ModelSection,
    "moe": MoeSection,
    "checkpoint": CheckpointSection,
    "budget": BudgetSection,
    "release": ReleaseSection,
    "launch": LaunchSection,
}
"""Every section by the name of its key, in the order of a written recipe."""
