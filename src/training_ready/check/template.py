"""Does the chat template say, in training and in serving alike, who speaks and when a turn ends?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from training_ready.check.context import CheckContext, Missing
from training_ready.check.finding import Finding, failed, not_run, passed, warned

if TYPE_CHECKING:
    from training_ready.stream.render import ChatRenderer

# What is rendered when no record can be read, and beside the records: two exchanges, as a history can be rewritten.
EXAMPLE = (
    {"role": "user", "content": "I cannot sleep."},
    {"role": "assistant", "content": "Since when?"},
    {"role": "user", "content": "Since the move."},
    {"role": "assistant", "content": "What changed with it?"},
)
_KEYS = ("chat_template_path", "model.tokenizer.chat_template", "model_name_or_path", "model.tokenizer")


def probe_template(context: CheckContext) -> list[Finding]:
    """End of turn, padding, history, vocabulary, and the prompt that a server would write."""
    renderer, key = context.renderer, context.first_set(*_KEYS)
    messages, origin = _shown(context)
    broken = [*_history(renderer, key, messages)]
    if broken:
        return broken
    findings = [
        *_padding(context, key),
        *_embedding(context),
        *_reading(context),
        *_prompt(context, messages, key),
        *_engine(context, messages, key),
    ]
    if any(finding.status == "fail" for finding in findings):
        return findings
    rendered = renderer.render(messages)
    pieces = marked(context.tokenizer, rendered.input_ids.tolist(), rendered.learned.tolist())
    ends = context.tokenizer.convert_ids_to_tokens(renderer.end_of_turn_id)
    text = (
        f"{int(rendered.learned.sum())} of {len(rendered.input_ids)} tokens of {origin} are learned, each turn up to "
        f"and including {ends!r}"
    )
    return [*findings, passed(text, sample=pieces, end_of_turn=ends, origin=origin)]


def marked(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> list[tuple[str, bool]]:
    """The text in runs: (text, is it learned?)."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or learned[at] != learned[start]:
            pieces.append((tokenizer.decode(ids[start:at]), bool(learned[start])))
            start = at
    return pieces


def _shown(context: CheckContext) -> tuple[Sequence[Mapping[str, str]], str]:
    """The shortest sampled conversation with two learned turns: a history can be rewritten, and it fits a screen."""
    try:
        records = context.sample.records
    except Missing:
        records = []
    if not records:
        return EXAMPLE, "an example (no record could be read)"
    role = context.recipe.data.target_role
    fitting = [row for row in records if row["target_role"] == role] or records
    twice = [row for row in fitting if sum(turn["role"] == role for turn in row["messages"]) > 1] or fitting
    chosen = min(twice, key=lambda row: sum(len(turn["content"]) for turn in row["messages"]))
    return chosen["messages"], f"record {chosen['content_hash'][:19]}"


def _history(
    renderer: ChatRenderer, key: str | None, messages: Sequence[Mapping[str, str]]
) -> Iterator[Finding]:
    from jinja2 import TemplateError

    from training_ready.stream.render import RenderError

    for conversation in (EXAMPLE, messages):
        try:
            renderer.render(conversation)
        except RenderError as error:
            yield failed(str(error), key=key, fix="give another template with chat_template_path: FILE.jinja")
            return
        except TemplateError as error:
            roles = [message["role"] for message in conversation]
            yield failed(f"the template refuses turns of {roles}: {error}", key=key)
            return


def _padding(context: CheckContext, key: str | None) -> Iterator[Finding]:
    tokenizer, end = context.tokenizer, context.renderer.end_of_turn_id
    pad = context.recipe.trl.get("pad_token") or tokenizer.pad_token
    pad_id = tokenizer.convert_tokens_to_ids(pad) if pad is not None else None
    place = context.first_set("pad_token", *_KEYS) if context.is_set("pad_token") else key
    if pad_id is None or (pad_id == tokenizer.unk_token_id and pad != tokenizer.unk_token):
        yield failed(f"the padding token {pad!r} is not in the vocabulary", key=place)
    elif pad_id in (tokenizer.eos_token_id, end):
        yield failed(
            f"padding is {pad!r}, which also ends a turn: what is masked as padding would never be learned as an end",
            key=place,
            fix="pad_token: <an unused special token of this tokenizer>",
        )
    eos = context.recipe.trl.get("eos_token")
    if eos is not None and tokenizer.convert_tokens_to_ids(eos) != end:
        written = tokenizer.convert_ids_to_tokens(end)
        yield failed(f"eos_token is {eos!r}, but the template ends a turn with {written!r}", key="eos_token")


def _embedding(context: CheckContext) -> Iterator[Finding]:
    """Tokens that have no row in the embedding: an index error in the middle of the run, or silence on a GPU."""
    try:
        rows = int(context.model_config.get_text_config().vocab_size)
    except Missing as missing:
        yield not_run(f"the rows of the embedding are unknown: {missing.blame}")
        return
    highest = max(context.tokenizer.get_vocab().values())
    if highest >= rows:
        unknown = [token for token, number in context.tokenizer.get_vocab().items() if number >= rows]
        yield failed(
            f"{len(unknown)} tokens have no row in the embedding ({rows} rows, ids up to {highest}): "
            f"{sorted(unknown)[:5]}",
            key=context.first_set("model_name_or_path", "model.config"),
            fix="use the tokenizer that belongs to the model",
        )


def _reading(context: CheckContext) -> Iterator[Finding]:
    """A tokenizer that nobody would load beside this model's configuration as it was trained with: no release."""
    from transformers import AutoTokenizer

    from training_ready.release.export import misreading

    try:
        config = context.model_config
    except Missing:
        return  # said already, of the embedding
    with TemporaryDirectory() as place:  # what a checkpoint will hold of the two
        config.save_pretrained(place)
        context.tokenizer.save_pretrained(place)
        fault = misreading(Path(place), AutoTokenizer.from_pretrained(place, trust_remote_code=False))
    if fault is not None:
        yield failed(fault, key=context.first_set("model.config.model_type", "model_name_or_path"))


def _prompt(
    context: CheckContext, messages: Sequence[Mapping[str, str]], key: str | None
) -> Iterator[Finding]:
    """A server writes the turns so far and the generation prompt: training must have continued exactly that."""
    if context.recipe.data.target_role != "assistant":
        return
    tokenizer = context.tokenizer
    for conversation in (EXAMPLE, messages):
        turns = [dict(turn) for turn in conversation]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if not last:
            continue
        served = str(tokenizer.apply_chat_template(turns[:last], tokenize=False, add_generation_prompt=True))
        trained = str(tokenizer.apply_chat_template(turns[: last + 1], tokenize=False))
        if not trained.startswith(served):
            at = next(
                (i for i, (a, b) in enumerate(zip(served, trained, strict=False)) if a != b), len(trained)
            )
            yield failed(
                f"a server's prompt ends {served[at:][-60:]!r} where training went on with {trained[at : at + 60]!r}",
                key=key,
                fix="use a template whose generation prompt is the beginning of an answer as it is trained",
            )
            return


def _engine(
    context: CheckContext, messages: Sequence[Mapping[str, str]], key: str | None
) -> Iterator[Finding]:
    """TGI renders with minijinja: the exported template must render there as it was trained."""
    if context.recipe.release.target != "tgi":
        return
    from training_ready.release.export import ExportError
    from training_ready.release.targets.chat_template import normalise

    tokenizer = context.tokenizer
    constants = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    try:
        exported = normalise(str(tokenizer.chat_template), constants)
    except ExportError as error:
        yield failed(f"TGI cannot be given this template: {error}", key=key)
        return
    try:
        from minijinja import Environment, TemplateError
    except ImportError:
        yield warned(
            "minijinja is not installed, so the template was not rendered as TGI would",
            fix="pip install minijinja",
        )
        return
    engine: Any = Environment(pycompat=True)  # the router answers Python's own methods too
    engine.add_function("raise_exception", _refuse)
    engine.add_function("strftime_now", lambda form: datetime.now().strftime(form))
    for turns, prompt in _requests(messages):
        trained = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
        try:
            served = engine.render_str(exported, messages=turns, add_generation_prompt=prompt, tools=None)
        except (TemplateError, ValueError) as error:
            reason = str(error).splitlines()[0]
            yield failed(f"TGI's template engine cannot render this template: {reason}", key=key)
            return
        if served != trained:
            at = next((i for i, (a, b) in enumerate(zip(served, trained, strict=False)) if a != b), -1)
            yield failed(
                f"TGI's template engine renders {served[at:][:60]!r} where training has {trained[at:][:60]!r}",
                key=key,
            )
            return


def _requests(messages: Sequence[Mapping[str, str]]) -> Iterator[tuple[list[dict[str, str]], bool]]:
    """What a server is asked to render: a conversation, and one that it is to answer."""
    for conversation in (EXAMPLE, messages):
        turns = [dict(turn) for turn in conversation]
        yield turns, False
        if len(turns) > 1 and turns[-1]["role"] == "assistant":
            yield turns[:-1], True


def _refuse(reason: str) -> None:
    raise ValueError(reason)
