"""Who says what in this row? Raw fields become turns, ``assistant`` always the therapist and ``user`` the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from training_ready.corpus.record import Role, Turn
from training_ready.corpus.text import normalise_text

Form = Literal[
    "auto",
    "messages",
    "conversations",
    "conversation",
    "instruction",
    "input_output",
    "question_answer",
    "context_response",
    "prompt_response",
]

_TURN_LISTS: tuple[Form, ...] = ("messages", "conversations", "conversation")
# Fields of the client's turn, field of the therapist's. In order: a row with an instruction also has input and output.
_PAIRS: dict[Form, tuple[tuple[str, ...], str]] = {
    "instruction": (("instruction", "input"), "output"),
    "input_output": (("input",), "output"),
    "question_answer": (("question",), "answer"),
    "context_response": (("context",), "response"),
    "prompt_response": (("prompt",), "response"),
}
_ROLE_WORDS: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human", "client", "patient"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "model", "therapist", "counselor", "counsellor"), "assistant"
    ),
}


class InvalidRow(ValueError):
    """The row has another shape than its source promised. The message never holds the row's text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """Turns in order (their text normalised, perhaps blank) and the fields that they were made of."""

    turns: list[Turn]
    used: frozenset[str]


def map_row(
    row: Mapping[str, object], *, columns: Mapping[Role, Sequence[str]] | None, form: Form = "auto"
) -> Mapped:
    """Turns of one raw row by explicit columns, or by one of the known forms. Raises :class:`InvalidRow`."""
    mapped = _by_columns(row, columns) if columns else _by_form(row, form)
    if any(turn.role == "system" for turn in mapped.turns[1:]):
        raise InvalidRow("a system turn stands after the first turn")
    return mapped


def recognised_form(fields: Sequence[str]) -> Form | None:
    """The first known form that rows with these fields have; letter case does not matter."""
    present = {field.lower() for field in fields}
    for form in _TURN_LISTS:
        if form in present:
            return form
    return next((form for form, (asked, reply) in _PAIRS.items() if {asked[0], reply} <= present), None)


def plain_text(value: object, field: str) -> str:
    """Normalised text of a cell; None is blank. Raises :class:`InvalidRow` for anything that is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRow(f"{field} should be text, found {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRow(f"{field} is not valid UTF-8") from None
    return normalise_text(value)


def _by_columns(row: Mapping[str, object], columns: Mapping[Role, Sequence[str]]) -> Mapped:
    turns: list[Turn] = []
    for role, names in columns.items():
        for name in names:
            if name not in row:
                raise InvalidRow(f"no field {name!r}, which columns.{role} names")
        _add(turns, role, [plain_text(row[name], name) for name in names])
    turns.sort(key=lambda turn: turn.role != "system")  # stable: a system text opens, wherever it was written
    return Mapped(turns=turns, used=frozenset(name for names in columns.values() for name in names))


def _by_form(row: Mapping[str, object], form: Form) -> Mapped:
    names = {name.lower(): name for name in row}
    if form == "auto":
        found = recognised_form(list(row))
        if found is None:
            raise InvalidRow(
                f"no known form of conversation in the fields {sorted(row)}; map them with columns:"
            )
        form = found
        if form == "prompt_response" and row.get(names.get("purpose", "")) == "difficult_client":
            # There the therapist prompts and the client responds: read as usual, the model would learn the client.
            raise InvalidRow("an edge case, whose prompt is the therapist's; map it with columns:")
    if form in _TURN_LISTS:
        if form not in names:
            raise InvalidRow(f"no field {form!r}")
        return Mapped(turns=_listed(row[names[form]], names[form]), used=frozenset({names[form]}))
    asked, reply = _PAIRS[form]
    if asked[0] not in names or reply not in names:
        raise InvalidRow(f"no fields {asked[0]!r} and {reply!r}")
    used = [names[name] for name in ("system", *asked, reply) if name in names]
    turns: list[Turn] = []
    for role, fields in (("system", ("system",)), ("user", asked), ("assistant", (reply,))):
        parts = [plain_text(row[names[name]], names[name]) for name in fields if name in names]
        _add(turns, role, parts)  # type: ignore[arg-type]  # the literals above are roles
    return Mapped(turns=turns, used=frozenset(used))


def _add(turns: list[Turn], role: Role, parts: list[str]) -> None:
    """One turn of the parts that say something. A blank system text is no turn; any other blank turn is kept, for
    the gates to see."""
    content = "\n\n".join(part for part in parts if part)
    if content or role != "system":
        turns.append(Turn(role, content))


def _listed(value: object, field: str) -> list[Turn]:
    if isinstance(value, Mapping):  # {client: …, therapist: …}
        return [_turn(role, text, field) for role, text in value.items()]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidRow(f"{field} should be a list of turns, found {type(value).__name__}")
    turns: list[Turn] = []
    for index, item in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(item, Mapping):
            raise InvalidRow(
                f"{where} should be an object with role and content, found {type(item).__name__}"
            )
        said_by = next((item[name] for name in ("role", "from", "speaker") if name in item), None)
        text = next((name for name in ("content", "value", "text") if name in item), None)
        if said_by is not None and text is not None:
            turns.append(_turn(said_by, item[text], where))
        elif item and all(str(name).lower() in _ROLE_WORDS for name in item):  # {client: …, therapist: …}
            turns += [_turn(role, said, where) for role, said in item.items()]
        else:
            raise InvalidRow(f"{where} has no role and content (or from and value)")
    return turns


def _turn(said_by: object, text: object, where: str) -> Turn:
    role = _ROLE_WORDS.get(said_by.strip().lower()) if isinstance(said_by, str) else None
    if role is None:
        raise InvalidRow(f"{where}: {said_by!r:.40} is not a known speaker; known are {sorted(_ROLE_WORDS)}")
    return Turn(role, plain_text(text, where))
