"""What is known about a finished run? The summary that training wrote, checked before a card quotes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from training_ready import TrainingReadyError

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CardError(TrainingReadyError):
    """A card cannot be written without inventing something; the message names the field."""


class _Facts(BaseModel):
    """Unknown fields are left out of the card; a number that is not finite is refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class RecipeFacts(_Facts):
    path: Text
    sha256: Sha256
    resolved: Text


class SourceFacts(_Facts):
    name: Text
    license: str
    """Of the kept records; empty where none was kept."""
    records_in: Count
    kept: Count
    rejected: dict[str, Count]
    pii_status: Text | None = None
    """What was done about personal data; None where the manifest does not say."""
    consent: Text | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> SourceFacts:
        rejected = sum(self.rejected.values())
        if self.records_in != self.kept + rejected:
            raise ValueError(f"{self.records_in} records in, but {self.kept} kept + {rejected} rejected")
        if self.kept and not self.license.strip():
            raise ValueError(f"{self.kept} records were kept without a license")
        return self


class CorpusFacts(_Facts):
    """A further corpus of the mixture."""

    corpus: Text
    manifest_uri: Text
    manifest_sha256: Sha256


class DataFacts(_Facts):
    corpus: Text
    manifest_uri: Text
    manifest_sha256: Sha256
    target_role: Literal["assistant", "user"]
    splits: dict[str, Count]
    sources: list[SourceFacts] = Field(min_length=1)
    other_corpora: list[CorpusFacts] = []


class PartFacts(_Facts):
    """What was trained of one part of the mixture, all epochs together.

    ``epochs`` is None where the run ended before the packs of an epoch were counted.
    """

    name: Text
    packs: Count
    epochs: float | None
    rows: Count
    tokens: Count
    learned_tokens: Count


class TokenFacts(_Facts):
    """Rows and tokens of all that was tokenised; ``untokenised_blocks`` were not when the run ended."""

    rows: Count
    tokens: Count
    learned_tokens: Count
    truncated_rows: Count
    truncated_tokens: Count
    dropped_rows: Count = 0
    dropped_tokens: Count = 0
    split_rows: Count = 0
    split_pieces: Count = 0
    untokenised_blocks: Count = 0
    packs: Count
    pack_fill: Share
    trained_tokens: Count
    trained_learned_tokens: Count
    trained_parts: list[PartFacts] = []


class LossFacts(_Facts):
    first: float
    last: float
    eval: float | None


class EvaluationFacts(_Facts):
    """One measured benchmark, of the model and, where it was measured too, of its base."""

    dataset_id: Text
    dataset_revision: Text | None = None
    task_id: Text
    metric: Text
    n: Annotated[int, Field(gt=0)]
    value: float
    base_value: float | None = None
    date: Text
    protocol: Text


class LayerFacts(_Facts):
    layer: Count
    load: list[Share] = Field(min_length=1)
    entropy: float

    @model_validator(mode="after")
    def _sums_to_one(self) -> LayerFacts:
        if abs(sum(self.load) - 1) > 1e-3:
            raise ValueError(f"the loads of layer {self.layer} sum to {sum(self.load):.6f}, not to 1")
        return self


class MoeFacts(_Facts):
    layers: list[LayerFacts] = Field(min_length=1)
    aux_loss_first: float | None
    aux_loss_last: float | None


class ModelFacts(_Facts):
    architecture: Text
    parameters_total: Count
    """Of the whole model, adapters merged."""
    parameters_merged: Count
    """Of the adapters that training had beside it."""
    parameters_trainable: Count
    base_model: Text | None
    base_revision: Text | None


class HardwareFacts(_Facts):
    device: Text
    device_count: Count
    processor: Text
    memory_gib: float


class RunFacts(_Facts):
    """`runs/<name>/summary.json`."""

    run: Text
    started_at: Text
    finished_at: Text
    wall_seconds: float
    steps: Count
    seed: int
    recipe: RecipeFacts
    data: DataFacts
    tokens: TokenFacts
    loss: LossFacts
    moe: MoeFacts | None
    model: ModelFacts
    versions: dict[str, Text]
    hardware: HardwareFacts
    checkpoint: Text
    pictures: list[Text]
    energy_kwh: Annotated[float, Field(gt=0)] | None = None
    """Measured at the machine; None where nothing measured it."""
    evaluations: list[EvaluationFacts] = []

    @model_validator(mode="after")
    def _shows_its_curves(self) -> RunFacts:
        wanted = ["loss.png", "expert_load.png"] if self.moe else ["loss.png"]
        if missing := [picture for picture in wanted if picture not in self.pictures]:
            raise ValueError(f"pictures: {', '.join(missing)} missing; training draws it")
        return self

    @field_validator("versions")
    @classmethod
    def _names_this_package(cls, versions: dict[str, str]) -> dict[str, str]:
        if "training-ready" not in versions:
            raise ValueError("training-ready is not among them, so the run could not be repeated")
        return versions


def load_facts(run_folder: Path) -> RunFacts:
    """Read and check the summary of a finished run. Raises CardError naming every field that is missing or wrong."""
    path = run_folder / "summary.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CardError(
            f"{path} does not exist: the run has not finished. Continue it, then release it."
        ) from error
    except ValueError as error:
        raise CardError(f"{path} is not JSON: {error}") from error
    return check_facts(content, path)


def check_facts(content: object, path: Path | str = "summary") -> RunFacts:
    """The same for a summary in memory; `path` is what a message calls it."""
    try:
        return RunFacts.model_validate(content)
    except ValidationError as error:
        raise CardError(f"{path} does not say enough for an honest card:\n  {faults_of(error)}") from error


def faults_of(error: ValidationError) -> str:
    """One line for each field that is missing or wrong."""
    return "\n  ".join(
        f"{'.'.join(str(part) for part in fault['loc']) or '(whole)'}: {fault['msg']}"
        for fault in error.errors()
    )
