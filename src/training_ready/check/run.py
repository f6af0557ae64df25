"""Every probe that can run, each with what it needs; nothing that did not run looks as if it had passed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training_ready import TrainingReadyError
from training_ready.check.context import CheckContext, Missing
from training_ready.check.finding import Finding, Status, failed, not_run, worst
from training_ready.check.keys import read_recipe
from training_ready.recipe.faults import did_you_mean

Probe = Callable[[CheckContext], list[Finding]]

PROBES = (
    "keys",
    "versions",
    "bucket",
    "data",
    "template",
    "loss_mask",
    "parameters",
    "topology",
    "memory",
    "schedule",
    "time_cost",
    "disk",
    "hub",
    "serving",
    "seeds",
)
"""By name, as ``--skip`` takes them. Each is ``probe_<name>`` of ``training_ready.check.<name>``."""


SKIPPED = "--skip leaves it out"
"""What a probe says that was left out."""

AFTER = {"memory": ("parameters", "topology")}
"""Probes that say nothing about a recipe of which another failed: a step that cannot run has no memory."""


class CheckError(TrainingReadyError):
    """The check cannot be made as asked, or it has found what would waste the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one probe said, and how long it took."""

    probe: str
    findings: list[Finding]
    seconds: float

    @property
    def status(self) -> Status:
        return worst(self.findings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All outcomes, in the order of :data:`PROBES`."""

    recipe: str
    outcomes: list[Outcome]

    @property
    def passed(self) -> bool:
        """No probe failed. Probes that did not run are listed, not counted as passed."""
        return all(outcome.status != "fail" for outcome in self.outcomes)

    @property
    def failures(self) -> list[tuple[str, Finding]]:
        return [(o.probe, f) for o in self.outcomes for f in o.findings if f.status == "fail"]

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "passed": self.passed,
            "probes": [
                {
                    "probe": outcome.probe,
                    "status": outcome.status,
                    "seconds": round(outcome.seconds, 3),
                    "findings": [asdict(finding) for finding in outcome.findings],
                }
                for outcome in self.outcomes
            ],
        }


def check_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    offline: bool = False,
    skip: Sequence[str] = (),
    starting: bool = False,
    told: Callable[[str], None] = lambda probe: None,
) -> Report:
    """Examine a recipe without loading a weight.

    Args:
        skip: names of probes to leave out; they are reported as not run.
        starting: this process trains next, on this machine.
        told: called with the name of each probe before it runs.

    Raises:
        CheckError: ``skip`` names no probe.
    """
    for name in skip:
        if name not in PROBES:
            raise CheckError(
                f"--skip {name}: no such probe; {did_you_mean(name, PROBES) or ', '.join(PROBES)}"
            )
    told("keys")
    recipe, faults = read_recipe(path, overrides)
    if recipe is None:
        outcomes = [Outcome(probe="keys", findings=faults, seconds=0.0)]
        outcomes += [_not_run(name, "the recipe cannot be read") for name in PROBES[1:]]
        return Report(recipe=str(path), outcomes=outcomes)
    context = CheckContext(recipe, offline=offline, starting=starting)
    outcomes = []
    for name in PROBES:
        told(name)
        broken = [o.probe for o in outcomes if o.probe in AFTER.get(name, ()) and o.status == "fail"]
        if name in skip:
            outcomes.append(_not_run(name, SKIPPED))
        elif broken:
            outcomes.append(_not_run(name, f"{' and '.join(broken)} failed"))
        else:
            outcomes.append(_run(name, context))
    return Report(recipe=str(path), outcomes=outcomes)


def _not_run(name: str, because: str) -> Outcome:
    return Outcome(probe=name, findings=[not_run(because)], seconds=0.0)


def _run(name: str, context: CheckContext) -> Outcome:
    started = time.monotonic()
    located = [_located(finding, context) for finding in _findings(name, context)]
    return Outcome(probe=name, findings=located, seconds=time.monotonic() - started)


def _findings(name: str, context: CheckContext) -> list[Finding]:
    """A probe's findings; what it could not have is its own fault, or another's, or nobody's."""
    try:
        return _probe(name)(context)
    except Missing as missing:
        if missing.owner == name:
            return [failed(missing.reason, key=missing.key)]
        return [not_run(missing.blame)]
    except TrainingReadyError as error:
        return [failed(str(error))]
    except Exception as error:
        error.add_note(f"in the probe {name}; `--skip {name}` goes on without it")
        raise


def _probe(name: str) -> Probe:
    module = importlib.import_module(f"training_ready.check.{name}")
    probe: Probe = getattr(module, f"probe_{name}")
    return probe


def _located(finding: Finding, context: CheckContext) -> Finding:
    if finding.where is not None or finding.key is None:
        return finding
    return replace(finding, where=context.where(finding.key))
