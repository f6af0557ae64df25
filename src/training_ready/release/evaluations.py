"""Which benchmarks were measured? The run's evaluations in the form that the Hub turns into leaderboards.

Format: `.eval_results/*.yaml`, a list of {dataset: {id, task_id, revision}, value, date, notes}, see
https://huggingface.co/docs/hub/eval-results. A run that measured none has no such file.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from training_ready.release.facts import RunFacts


def write_evaluations(folder: Path, facts: RunFacts) -> list[Path]:
    """One file for each benchmark; its notes name the metric, the number of examples and the protocol."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    written = []
    for dataset in sorted({evaluation.dataset_id for evaluation in facts.evaluations}):
        entries = [
            EvalResultEntry(
                dataset_id=one.dataset_id,
                task_id=one.task_id,
                value=one.value,
                dataset_revision=one.dataset_revision,
                date=one.date,
                notes=f"{one.metric}, n = {one.n}; {one.protocol}",
            )
            for one in facts.evaluations
            if one.dataset_id == dataset
        ]
        path = folder / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', dataset)}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8"
        )
        written.append(path)
    return written
