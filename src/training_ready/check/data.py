"""Are the records what the recipe takes them for, and how much of them would be cut away?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from training_ready.check.context import CheckContext, Missing
from training_ready.check.corpora import mixture_parts, origin_of
from training_ready.check.finding import Finding, failed, not_run, passed, warned
from training_ready.check.sample import Sample


def probe_data(context: CheckContext) -> list[Finding]:
    """Validity, target role, duplicates, empty turns, stages, the evaluation split, and truncation."""
    sample = context.sample
    findings = [
        *_splits(context),
        *_roles(context),
        *_invalid(context, sample),
        *_duplicates(sample),
        *_unreached(sample),
    ]
    findings = findings or [
        passed(f"{sample}: each valid, no duplicate, no empty turn", records=len(sample.records))
    ]
    try:
        return [*findings, *_truncation(context)]
    except Missing as missing:
        return [*findings, not_run(f"truncation cannot be counted: {missing.blame}", key="max_length")]


def _splits(context: CheckContext) -> Iterator[Finding]:
    manifest, recipe = context.corpus.manifest, context.recipe
    split = recipe.data.eval_split
    if split and not manifest.shards_of(split):
        yield failed(
            f"the corpus {manifest.name!r} has no split {split!r}",
            key="data.eval_split",
            fix=f"name one of {sorted(manifest.splits)}",
        )
    for name, part in mixture_parts(recipe).items():
        corpus = context.corpora[origin_of(part, recipe)[0]].manifest
        key = "data.stages" if recipe.stream.mixture is None else f"stream.mixture.{name}"
        stages = [str(stage) for stage, count in corpus.stages.items() if count]
        families = [source.family for source in corpus.sources if source.kept]
        for what, wanted, there in (("stage", part.stages, stages), ("source", part.sources, families)):
            absent = sorted(set(wanted or ()) - set(there))
            if absent:
                yield failed(
                    f"no record of the corpus is of the {what} {', '.join(absent)}; it has {', '.join(there)}",
                    key=key,
                    fix="leave it out, or build a corpus that has it",
                )


def _roles(context: CheckContext) -> Iterator[Finding]:
    wanted = context.recipe.data.target_role
    for corpus in context.corpora.values():
        counts = corpus.manifest.target_roles
        others = {role: count for role, count in counts.items() if role != wanted and count}
        if others:
            said = ", ".join(f"{count:,} whose target is {role!r}" for role, count in others.items())
            yield failed(
                f"data.target_role is {wanted!r}, and {corpus.manifest.uri} holds {said}",
                key="data.target_role",
                fix="a therapist and a simulated client are different datasets: build one corpus for each",
            )


def _invalid(context: CheckContext, sample: Sample) -> Iterator[Finding]:
    from pydantic import ValidationError

    from training_ready.corpus.record import Record

    faults: dict[str, list[str]] = {}
    for row in sample.records:
        try:
            Record.model_validate({"messages": row["messages"], "metadata": json.loads(row["metadata"])})
        except (ValidationError, ValueError) as error:
            reason = _reason(error)
            faults.setdefault(reason, []).append(row["content_hash"])
    for reason, hashes in faults.items():
        yield failed(
            f"{len(hashes)} of {sample} are invalid ({reason}); the first is {hashes[0]}",
            key="data.corpus",
            fix="build the corpus again with `training-ready data build`",
        )


def _reason(error: Any) -> str:
    if not hasattr(error, "errors"):
        return f"metadata: {error}"
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "record"
    if place.endswith("content") and first["type"] in ("string_too_short", "string_pattern_mismatch"):
        return "an empty turn"
    return f"{place}: {first['msg']}"


def _duplicates(sample: Sample) -> Iterator[Finding]:
    counts = Counter(row["content_hash"] for row in sample.records)
    repeated = {name: count for name, count in counts.items() if count > 1}
    if repeated:
        name, count = max(repeated.items(), key=lambda item: item[1])
        yield failed(
            f"{sum(repeated.values()) - len(repeated)} of {sample} repeat another; {name} is there {count} times",
            key="data.corpus",
            fix="build the corpus again: its build removes duplicates",
        )


def _unreached(sample: Sample) -> Iterator[Finding]:
    if sample.unreached:
        yield warned(f"no record of {', '.join(sample.unreached)} was in the shards that were opened")


def _truncation(context: CheckContext) -> list[Finding]:
    """Rows and tokens that the length policy would cost, as shares of the sample."""
    tokens, recipe = context.tokens, context.recipe
    if tokens.max_length is None:
        return [
            failed("max_length is null: a pack has no length", key="max_length", fix="set a number of tokens")
        ]
    lengths = tokens.lengths
    over = lengths > tokens.max_length
    lost = lengths - tokens.max_length if recipe.stream.overlong == "truncate" else lengths
    if recipe.stream.overlong == "split_turns":
        return [
            passed(f"{int(over.sum()):,} of {len(lengths):,} rows are split between turns, nothing is cut")
        ]
    rows, cut = float(over.mean()), float(lost[over].sum() / lengths.sum())
    longest, limit = int(lengths.max()), recipe.stream.max_truncated
    text = (
        f"{int(over.sum()):,} of {len(lengths):,} rows ({rows:.1%}) and {cut:.1%} of {int(lengths.sum()):,} tokens are "
        f"beyond max_length {tokens.max_length}; the longest row has {longest}, half have at most "
        f"{int(np.median(lengths))}"
    )
    measured: dict[str, Any] = {"rows": rows, "tokens": cut, "longest": longest, "limit": limit}
    if recipe.stream.overlong == "error" and over.any():
        return [
            failed(f"{text}; stream.overlong: error stops the run there", key="stream.overlong", **measured)
        ]
    if max(rows, cut) > limit:
        fits = int(np.quantile(lengths, 1 - limit)) if limit < 1 else tokens.max_length
        return [
            failed(
                f"{text}; the limit is {limit:.1%} (stream.max_truncated)",
                key="max_length",
                fix=f"max_length {_rounded(fits)} leaves {1 - limit:.0%} of the rows whole; or raise the limit",
                **measured,
            )
        ]
    return [passed(text, **measured)]


def _rounded(length: int) -> int:
    """Up to a multiple of 64."""
    return -(-(length + 1) // 64) * 64
