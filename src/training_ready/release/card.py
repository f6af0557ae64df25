"""What does the world get to know about this model? A card made of the run's facts and the recipe's own words.

Numbers come from :mod:`.facts` and from the release folder; what the model is for and where it fails comes from the
recipe's `release:` section. A field that is missing there fails the release instead of being filled in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Protocol

from training_ready.release.card_adapter import Adapter, read_adapter
from training_ready.release.contents import EXPORT, ReleaseFile, hash_file, target_of
from training_ready.release.evaluations import write_evaluations
from training_ready.release.facts import CardError, RunFacts
from training_ready.release.record import ReleaseRecord, Words, write_record
from training_ready.release.served_by import ENGINES, Row, check_verified, read_reports, served_by
from training_ready.storage.durable import write_durably

CARD = "README.md"

_ROLES = {"assistant": "the therapist", "user": "the client"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SECRET_PATTERNS = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    re.compile(r"\btr_[A-Za-z0-9_-]{43}"),  # of `hub token add`
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY")


class ReleaseWords(Protocol):
    """The recipe's `release:` section, as far as a card needs it."""

    @property
    def license(self) -> str | None: ...
    @property
    def language(self) -> Sequence[str]: ...
    @property
    def tags(self) -> Sequence[str]: ...
    @property
    def summary(self) -> str | None: ...
    @property
    def intended_use(self) -> str | None: ...
    @property
    def limits(self) -> str | None: ...


def write_card(
    facts: RunFacts, words: ReleaseWords, run_folder: Path, release_folder: Path, *, title: str
) -> Path:
    """Copy the run's pictures into the release folder and write release.json and README.md beside the weights.

    Raises CardError when a picture, the chat template or a required text is missing; README.md is then not written.
    """
    generation = json.loads((release_folder / "generation_config.json").read_bytes())
    record = make_record(facts, words, release_folder, title=title, ends=generation["eos_token_id"])
    return lay_card(record, run_folder, release_folder)


def make_record(
    facts: RunFacts, words: ReleaseWords, tokenizer_folder: Path, *, title: str, ends: Sequence[int]
) -> ReleaseRecord:
    """What a card is written from; `ends` are the token ids that end an answer. Raises CardError for a missing text."""
    require_words(words)
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_bytes())
    names = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    return ReleaseRecord(
        title=title,
        facts=facts,
        words=Words.model_validate(words),
        chat_template=(tokenizer_folder / "chat_template.jinja").read_text(encoding="utf-8"),
        end_of_turn={token: names.get(token, "") for token in ends},
        special_tokens=_special_tokens(tokenizer_folder),
    )


def lay_card(record: ReleaseRecord, run_folder: Path, folder: Path) -> Path:
    """Lay release.json, the run's pictures and benchmarks, and README.md beside the weights in `folder`.

    Raises CardError when a picture is missing; README.md is then not written.
    """
    for picture in record.facts.pictures:
        source = run_folder / picture
        if Path(picture).name != picture or not source.is_file():
            raise CardError(f"pictures: {picture!r} is not a file in {run_folder}")
        shutil.copyfile(source, folder / picture)
    write_record(folder, record)
    write_evaluations(folder, record.facts)
    refresh_card(folder, record)
    return folder / CARD


def refresh_card(
    folder: Path, record: ReleaseRecord, hashed: Sequence[ReleaseFile] | None = None
) -> ReleaseFile:
    """Write README.md of a release or an export from its record, its files and what `release verify` found.

    `hashed` are the files of the folder, where the caller has hashed them already. Returns the card as a file.

    Raises CardError for a missing picture or text, ContentsError for an export that was not verified.
    """
    require_words(record.words)
    missing = [picture for picture in record.facts.pictures if not (folder / picture).is_file()]
    if missing:
        raise CardError(f"pictures: {', '.join(missing)} of the run are not in {folder}")
    if hashed is None:
        hashed = [hash_file(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [file for file in hashed if file.path != CARD]
    hashes = {file.path: file.sha256 for file in files}
    reports = read_reports(folder)
    target = target_of(folder)
    if (folder / EXPORT).is_file():
        check_verified(folder, target, reports.get(target), hashes)
        about: Mapping[str, str] = json.loads((folder / EXPORT).read_bytes())["release"]
    else:
        about = hashes
    adapter = read_adapter(folder)
    text = render_card(
        record.facts,
        record.words,
        title=record.title,
        chat_template=record.chat_template,
        end_of_turn=record.end_of_turn,
        special_tokens=record.special_tokens,
        files=files,
        engines=served_by(reports, about, ("adapter",) if adapter else tuple(ENGINES)),
        adapter=adapter,
    )
    write_durably(folder / CARD, text, mode=0o644)
    return hash_file(folder / CARD, folder)


def render_card(
    facts: RunFacts,
    words: ReleaseWords,
    *,
    title: str,
    chat_template: str,
    end_of_turn: Mapping[int, str],
    special_tokens: Mapping[str, str],
    files: Sequence[ReleaseFile] = (),
    engines: Sequence[Row] = (),
    adapter: Adapter | None = None,
) -> str:
    """The text of README.md: Hub metadata, then sections from the facts.

    Args:
        title: the model's name, without its owner.
        end_of_turn: {token id: token} that end an answer.
        special_tokens: {the tokenizer's name for it: token}.
        files: what is released beside the card.
        engines: what is known about each engine that may serve it.
        adapter: what is released, where it is no whole model.

    Raises CardError when a required text is missing, or when the card would quote a secret.
    """
    from jinja2 import Environment, StrictUndefined

    require_words(words)
    # The output is Markdown, where HTML escaping would be shown; cells and fences are escaped by the filters.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    environment.filters |= {
        "cell": _cell,
        "count": lambda number: f"{number:,}",
        "number": lambda number: f"{number:.4g}",
        "percent": lambda share: f"{share:.1%}",
        "reasons": _reasons,
        "duration": _duration,
        "fence": _fence,
    }
    template = environment.from_string(
        (package_files(__package__) / "card.md.jinja").read_text(encoding="utf-8")
    )
    text = template.render(
        facts=facts,
        title=title,
        metadata=_metadata(facts, words, adapter),
        adapter=adapter,
        base_is_public=_on_a_hub(facts),
        base_name=_base_name(facts),
        end_ids=list(end_of_turn),
        summary=words.summary,
        intended_use=words.intended_use,
        limits=words.limits,
        base=_base(facts),
        role_meaning=_ROLES[facts.data.target_role],
        ends=" or ".join(
            f"`{token}` (id {number})" if token else f"id {number}" for number, token in end_of_turn.items()
        ),
        chat_template=chat_template,
        special_tokens=special_tokens,
        experts=max((len(layer.load) for layer in facts.moe.layers), default=0) if facts.moe else 0,
        hardware=_hardware(facts),
        files=files,
        engines=engines or served_by({}, {}),
    )
    _refuse_secrets(text)
    return text


def require_words(words: ReleaseWords) -> None:
    """Raise CardError naming every text that the recipe owes the card."""
    missing = [
        f"release.{name}"
        for name in ("license", "language", "summary", "intended_use", "limits")
        if not getattr(words, name)
    ]
    if missing:
        raise CardError(
            f"the recipe does not say {', '.join(missing)}: a model is not released without. Add it under `release:`."
        )


def _special_tokens(folder: Path) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json; a token may be written as text or with its flags."""
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    found = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    return {
        f"{name}_token": str(token["content"] if isinstance(token, dict) else token)
        for name, token in found.items()
        if token
    }


def _metadata(facts: RunFacts, words: ReleaseWords, adapter: Adapter | None) -> str:
    """The YAML block that hubs index. Only what is known: no dataset id, no base model unless a hub has it."""
    from huggingface_hub import ModelCardData

    family = [*(["mixture-of-experts"] if facts.moe else []), *(["lora"] if adapter else [])]
    on_a_hub = _on_a_hub(facts)
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if adapter and on_a_hub else {}
    data = ModelCardData(
        license=words.license,
        language=list(words.language),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["conversational", *family, "training-ready", *words.tags],
        base_model=facts.model.base_model if on_a_hub else None,
        **relation,
    )
    return str(data.to_yaml()).strip()


def _on_a_hub(facts: RunFacts) -> bool:
    base = facts.model.base_model
    return base is not None and _HUB_ID.fullmatch(base) is not None and not Path(base).exists()


def _base_name(facts: RunFacts) -> str:
    """The base model as others may know it: the last part of a local path says enough."""
    base = facts.model.base_model or ""
    return base if _on_a_hub(facts) else Path(base).name


def _base(facts: RunFacts) -> str:
    base, revision = facts.model.base_model, facts.model.base_revision
    if base is None:
        return "none: trained from random weights"
    name = base if _on_a_hub(facts) else f"a local model, {_base_name(facts)}"
    return f"{name} at revision {revision}" if revision else f"{name}, revision not recorded"


def _hardware(facts: RunFacts) -> str:
    hardware = facts.hardware
    devices = "CPU only" if hardware.device_count == 0 else f"{hardware.device_count} × {hardware.device}"
    return f"{devices}; processor {hardware.processor}, {hardware.memory_gib:g} GiB of memory"


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").strip()


def _reasons(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in rejected.items() if number) or "none"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _refuse_secrets(text: str) -> None:
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= 8 and value in text:
            raise CardError(f"the card would publish the value of {name}; remove it from the recipe")
    for pattern in _SECRET_PATTERNS:
        if pattern.search(text):
            raise CardError(f"the card would publish what looks like a secret ({pattern.pattern}); remove it")
