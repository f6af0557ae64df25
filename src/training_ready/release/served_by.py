"""Which engines were seen to compute what was trained? What `release verify` found, kept beside the weights.

`verified-<target>.json` lies in the release and in the export that was verified. It names the weights it is about, so
that a report of other weights is not quoted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from training_ready.release.contents import EXPORT, ContentsError, hash_file, strangers
from training_ready.release.facts import CardError, Text
from training_ready.storage.durable import write_durably

ENGINES: Mapping[str, str] = {
    "hf": "transformers 5",
    "vllm": "vLLM, through transformers 5",
    "tgi": "TGI 3.3.7, through transformers 4.51.0",
    "gguf": "llama.cpp",
    "ollama": "ollama, through llama.cpp",
    "adapter": "PEFT",
}


class Check(BaseModel):
    """One comparison of `release verify`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    check: Text
    result: Text
    passed: bool
    difference: float | None = None


class Report(BaseModel):
    """All comparisons of one export with its release."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    target: Text
    dtype: Text
    release: dict[str, str]
    """Name to sha256 of the release's weights, configuration and tokenizer."""
    export: dict[str, str]
    """Name to sha256 of the verified files."""
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """One line of the card's table."""

    engine: str
    verdict: str
    difference: str
    checks: str


def report_name(target: str) -> str:
    return f"verified-{target}.json"


def keep_report(
    folder: Path, release: Path, *, target: str, dtype: str, checks: Sequence[Mapping[str, object]]
) -> None:
    """Write what was found about the export `folder` into it and into its `release`.

    An adapter's "release" is a checkpoint, which is left as training wrote it.
    """
    marker = json.loads((folder / EXPORT).read_bytes())
    hashes = {name: hash_file(folder / name, folder).sha256 for name in marker["files"]}
    # A card is written again when its engines are known, so it is not what was verified.
    hashes.pop("README.md", None)
    report = Report.model_validate(
        {"target": target, "dtype": dtype, "release": marker["release"], "export": hashes, "checks": checks}
    )
    for place in (folder, release) if target != "adapter" else (folder,):
        write_durably(place / report_name(target), report.model_dump_json(indent=1) + "\n", mode=0o644)


def read_reports(folder: Path) -> dict[str, Report]:
    """{target: report} of what lies in `folder`. Raises CardError for one that cannot be read."""
    found = {}
    for path in sorted(folder.glob("verified-*.json")):
        try:
            report = Report.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise CardError(
                f"{path} is not a report of `release verify`: remove it, and verify again"
            ) from error
        found[report.target] = report
    return found


def check_verified(folder: Path, target: str, report: Report | None, hashes: Mapping[str, str]) -> None:
    """Raise ContentsError unless the export `folder`, whose files have `hashes`, passed `release verify` as it is."""
    why = None
    if report is None:
        why = "it was not verified"
    elif not report.passed:
        why = f"it failed: {', '.join(check.check for check in report.checks if not check.passed)}"
    elif changed := [name for name, sha256 in report.export.items() if hashes.get(name) != sha256]:
        why = f"{', '.join(changed)} changed since it was verified"
    elif added := strangers(hashes, report.export):
        raise ContentsError(
            f"{folder} is an export for {target}, and {', '.join(added)} was not there when it was made: an engine may "
            "load that, too. Nothing was sent. Remove it, or export and verify again."
        )
    if why:
        raise ContentsError(
            f"{folder} is an export for {target}, and {why}. Nothing was sent. Run: "
            f"training-ready release verify {folder} --target {target} --release RELEASE"
        )


def served_by(
    reports: Mapping[str, Report], hashes: Mapping[str, str], targets: Sequence[str] = tuple(ENGINES)
) -> list[Row]:
    """A row for every engine of `targets`; `hashes` are those of the release that the card is about."""
    return [_row(target, ENGINES[target], reports.get(target), hashes) for target in targets]


def _row(target: str, engine: str, report: Report | None, hashes: Mapping[str, str]) -> Row:
    if report is None:
        return Row(engine=engine, verdict="not verified", difference="not measured", checks="")
    added = [name for name in hashes if name.endswith(".safetensors") and name not in report.release]
    if added or any(hashes.get(name) != sha256 for name, sha256 in report.release.items()):
        return Row(
            engine=engine,
            verdict="not verified: the report is of other weights",
            difference="not measured",
            checks="",
        )
    failed = [check.check for check in report.checks if not check.passed]
    measured = [check.difference for check in report.checks if check.difference is not None]
    return Row(
        engine=engine,
        verdict="verified" if report.passed else f"failed: {', '.join(failed) or 'nothing was checked'}",
        difference=f"{max(measured):.1e} ({report.dtype})" if measured else "not measured",
        checks="; ".join(
            f"{check.check}: {check.result}" for check in report.checks if check.difference is None
        ),
    )
