"""What should the corpus be made of? The build specification, one YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from training_ready import TrainingReadyError
from training_ready.corpus.adapters import Form
from training_ready.corpus.readers import Format
from training_ready.corpus.record import Domain, NonBlank, PiiStatus, Role, Split, Stage, TargetRole

RowField = Literal[
    "stage",
    "target_role",
    "license",
    "domain",
    "language",
    "crisis",
    "components",
    "persona_id",
    "voice_signature",
    "quality_score",
    "bias_flags",
]
ROW_FIELDS: tuple[RowField, ...] = get_args(RowField)
HOLDOUT_FAMILIES = ("long_running_therapy", "edge_case_crisis", "sarcasm", "voice_persona")
"""Source families that only ever test a model."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class SpecError(TrainingReadyError):
    """The specification cannot be used; the message lists every fault with its line."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Source(_Section):
    """One raw dataset in the bucket and how its rows are to be understood.

    ``columns`` maps roles to one or several columns (joined as paragraphs); turns follow in the order written. Without
    it the row's own form is recognised (``form``). ``row_fields`` names the facts that each row states itself; they win
    over the values given here, except ``target_role``, where a contradiction rejects the row. ``group_by`` columns keep
    rows together in one split: rows that share a value in any of them are one group. ``withhold`` maps a column to a
    regular expression: what it finds there (a person's name, say) must not occur in the record's text.
    ``may_reject_all`` lets the build go on when no row of the source is kept. ``pii_status`` and ``consent`` (what the
    people in the texts agreed to, in words) are declarations: they go into the manifest and the model card as they are.
    """

    name: Name
    family: Name | None = None
    path: Annotated[list[NonBlank], Field(min_length=1)]
    format: Format = "auto"
    records_key: str = "conversations"
    form: Form = "auto"
    columns: dict[Role, list[NonBlank]] | None = None
    stage: Stage | None = None
    target_role: TargetRole | None = None
    license: NonBlank | None = None
    domain: Domain | None = None
    language: NonBlank | None = None
    pii_status: PiiStatus = "requires_review"
    consent: NonBlank | None = None
    row_fields: list[RowField] = []
    group_by: list[NonBlank] = []
    split_column: NonBlank | None = None
    metadata: dict[NonBlank, NonBlank] = {}
    withhold: dict[NonBlank, str] = {}
    may_reject_all: bool = False

    _lists = field_validator("path", "group_by", mode="before")(_one_or_more)

    @field_validator("columns", mode="before")
    @classmethod
    def _column_lists(cls, value: object) -> object:
        return (
            {role: _one_or_more(names) for role, names in value.items()} if isinstance(value, dict) else value
        )

    @field_validator("withhold")
    @classmethod
    def _patterns_compile(cls, value: dict[str, str]) -> dict[str, str]:
        for column, pattern in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the expression for {column!r} is not one: {error}") from error
        return value

    @model_validator(mode="after")
    def _is_complete(self) -> Source:
        for field in ("stage", "target_role", "license"):
            if getattr(self, field) is None and field not in self.row_fields:
                raise ValueError(
                    f"{field} is missing: give it, or list it in row_fields if every row states it"
                )
        if self.columns is not None:
            if not all(self.columns.values()) or not {"user", "assistant"} <= self.columns.keys():
                raise ValueError("columns needs at least one column for user and one for assistant")
            if self.form != "auto":
                raise ValueError("columns and form exclude each other")
        return self

    @property
    def source_family(self) -> str:
        return self.family or self.name

    def mapped_columns(self) -> dict[str, str]:
        """Every column that the specification names, with the setting that names it."""
        named = {
            column: f"columns.{role}" for role, names in (self.columns or {}).items() for column in names
        }
        named |= dict.fromkeys(self.group_by, "group_by")
        named |= {column: f"metadata.{name}" for name, column in self.metadata.items()}
        named |= dict.fromkeys(self.withhold, "withhold")
        return named | ({self.split_column: "split_column"} if self.split_column else {})


class CorpusSpec(_Section):
    """A whole corpus. ``seed`` decides which groups are held out; the split of a group depends on nothing else."""

    name: Name
    seed: int = 0
    splits: dict[Split, Annotated[float, Field(ge=0, le=1)]] = {"train": 0.9, "val": 0.05, "test": 0.05}
    holdout_families: list[str] = list(HOLDOUT_FAMILIES)
    allowed_licenses: Annotated[list[NonBlank], Field(min_length=1)]
    row_group_records: Annotated[int, Field(ge=1, le=100_000)] = 1000
    shard_records: Annotated[int, Field(ge=1)] = 50_000
    sources: Annotated[list[Source], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_consistent(self) -> CorpusSpec:
        if abs(sum(self.splits.values()) - 1) > 1e-9:
            shares = " + ".join(f"{split} {share}" for split, share in self.splits.items())
            raise ValueError(f"the split shares must add up to 1: {shares} = {sum(self.splits.values()):g}")
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are called {', '.join(repeated)}")
        paths = [path for source in self.sources for path in source.path]
        if repeated := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"listed more than once: {', '.join(repeated)}")
        return self


def load_spec(path: Path) -> CorpusSpec:
    """Reads and checks a specification. Raises :class:`SpecError` with all faults as ``file:line: key: why``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: the specification cannot be read: {error}") from error
    try:
        tree, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SpecError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(tree, yaml.MappingNode):
        raise SpecError(f"{path}:1: a specification is a mapping of keys to values; see docs/corpus.md")
    if repeated := _repeated_keys(tree):
        raise SpecError("\n".join(f"{path}:{line}: {key} is written twice" for line, key in repeated))
    try:
        return CorpusSpec.model_validate(values)
    except ValidationError as error:
        faults = [_fault(path, tree, dict(fault)) for fault in error.errors()]
        raise SpecError("\n".join([f"{path} cannot be built:", *faults])) from error


def _fault(path: Path, tree: yaml.MappingNode, fault: dict[str, Any]) -> str:
    location: tuple[str | int, ...] = fault["loc"]
    node: yaml.Node = tree
    line = node.start_mark.line
    for part in location:
        found = _child(node, part)
        if found is None:
            break
        node, line = found
    key = ".".join(str(part) for part in location) or "the specification"
    why = "unknown key; docs/corpus.md lists them" if fault["type"] == "extra_forbidden" else fault["msg"]
    return f"  {path}:{line + 1}: {key}: {why.removeprefix('Value error, ')}"


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, int] | None:
    """The node under ``part`` and the line to show for it (that of a key, not of its value)."""
    if isinstance(node, yaml.MappingNode):
        return next(((value, key.start_mark.line) for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part].start_mark.line
    return None


def _repeated_keys(node: yaml.Node) -> list[tuple[int, str]]:
    if isinstance(node, yaml.SequenceNode):
        return [found for child in node.value for found in _repeated_keys(child)]
    if not isinstance(node, yaml.MappingNode):
        return []
    faults: list[tuple[int, str]] = []
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            faults.append((key.start_mark.line + 1, str(key.value)))
        seen.add(str(key.value))
        faults += _repeated_keys(value)
    return faults
