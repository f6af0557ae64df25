"""Is exactly the target role's text learned, and something of every record?"""

from __future__ import annotations

from collections.abc import Iterator

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, passed
from training_ready.check.sample import TokenSample
from training_ready.check.template import marked

_COMPARED = 50
"""Records whose learned text is read back and compared with their turns."""


def probe_loss_mask(context: CheckContext) -> list[Finding]:
    """Records without a learned token, before and after truncation; learned text that is not the target's."""
    tokens = context.tokens
    findings = [*_unlearned(context, tokens), *_foreign(context)]
    learned = sum(int(row.learned.sum()) for row in tokens.rows)
    total = int(tokens.lengths.sum())
    if learned == total:
        findings.append(failed("every token is learned, the other speaker's too", key="data.target_role"))
    role = context.recipe.data.target_role
    return findings or [
        passed(
            f"{learned:,} of {total:,} tokens ({learned / total:.1%}) of {len(tokens.rows):,} records are learned: the "
            f"turns of {role!r} and their ends",
            learned=learned,
            tokens=total,
        )
    ]


def _unlearned(context: CheckContext, tokens: TokenSample) -> Iterator[Finding]:
    reasons: dict[str, list[str]] = {}
    for name, reason in tokens.faults:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield failed(
            f"{len(names)} of {len(names) + len(tokens.rows)} sampled records cannot be learned from ({reason}); the "
            f"first is {names[0]}",
            key="data.target_role" if "target role" in reason else "chat_template_path",
            fix="take such records out of the corpus, or correct data.target_role",
        )
    limit = tokens.max_length
    if limit is None:
        return
    cut = sum(1 for row in tokens.rows if not row.learned[:limit].any())
    if cut > context.recipe.stream.max_truncated * len(tokens.rows):
        yield failed(
            f"{cut} of {len(tokens.rows)} sampled records have no learned token within max_length {limit} and would be "
            "dropped",
            key="max_length",
            fix="raise max_length",
        )


def _foreign(context: CheckContext) -> Iterator[Finding]:
    """Read back: the learned text, without the ends of turns, must be the target's turns and nothing else."""
    role, tokenizer = context.recipe.data.target_role, context.tokenizer
    end = tokenizer.convert_ids_to_tokens(context.renderer.end_of_turn_id)
    tokens = context.tokens
    for record, row in zip(tokens.records[:_COMPARED], tokens.rows, strict=False):
        pieces = marked(tokenizer, row.input_ids.tolist(), row.learned.tolist())
        found = [text.replace(end, "").strip() for text, learned in pieces if learned]
        expected = [turn["content"].strip() for turn in record["messages"] if turn["role"] == role]
        if "".join(found) != "".join(expected):
            at = next(
                (pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), (found, expected)
            )
            yield failed(
                f"record {record['content_hash']}: learned is {str(at[0])[:80]!r}, the turn says {str(at[1])[:80]!r}",
                key="chat_template_path",
                fix="use a template that writes turns as they are",
            )
            return
