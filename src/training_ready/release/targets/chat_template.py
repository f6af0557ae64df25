"""Does the serving engine write the prompt that was trained? A chat template made explicit for minijinja.

Training renders with Jinja, ``trim_blocks`` and ``lstrip_blocks`` on; TGI's router renders with minijinja 2.8, both off,
and knows neither ``{% generation %}`` nor slices with a negative step. Jinja's own lexer applies the whitespace rules
here, so that the written template says the same in both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from training_ready.release.export import ExportError

# What a minijinja that follows Rust's notion of a sequence would answer differently from Python's.
_TESTS = {
    "iterable": "(({0} is iterable or {0} is string) and {0} is not none)",
    "sequence": "({0} is sequence or {0} is string or {0} is mapping)",
}
_OPENERS = {")": "(", "]": "[", "}": "{"}


class Token(NamedTuple):
    kind: str
    text: str


def normalise(template: str, constants: Mapping[str, str | None] | None = None) -> str:
    """The template with its whitespace rules applied, written so that Jinja and minijinja render it alike.

    `constants` are names that the engine does not pass; they become literals (None: the empty string).

    Raises ExportError when `template` is not Jinja.
    """
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        tokens = [Token(kind, text) for _, kind, text in environment.lex(template)]
    except TemplateSyntaxError as error:
        raise ExportError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from error
    return "".join(_written(tokens, constants or {}))


def _written(tokens: Sequence[Token], constants: Mapping[str, str | None]) -> Iterable[str]:
    text = ""
    place = 0
    while place < len(tokens):
        kind = tokens[place].kind
        if kind == "data":
            text += tokens[place].text
        elif kind in ("block_begin", "variable_begin"):
            end = next(at for at in range(place, len(tokens)) if tokens[at].kind == kind[:-5] + "end")
            inner = [token for token in tokens[place + 1 : end] if token.kind != "whitespace"]
            place = end
            if inner[:1] and inner[0].text in ("generation", "endgeneration") and kind == "block_begin":
                place += 1
                continue
            yield _literal_text(text)
            text = ""
            # "+" keeps Jinja from applying the rules a second time.
            opening, closing = ("{%+ ", " +%}") if kind == "block_begin" else ("{{ ", " }}")
            yield opening + _expression(inner, constants) + closing
        place += 1
    yield _literal_text(text, last=True)


def _literal_text(text: str, *, last: bool = False) -> str:
    """Text outside of tags; what the lexer of either engine would take for a tag, or drop, becomes an expression."""
    pieces = text.split("{")
    written = pieces[0]
    for piece in pieces[1:]:
        special = not piece or piece[0] in "{%#"
        written += ("{{ '{' }}" if special else "{") + piece
    if last and text.endswith("\n"):
        written = written[:-1] + '{{ "\\n" }}'
    return written


def _expression(tokens: Sequence[Token], constants: Mapping[str, str | None]) -> str:
    parts: list[str] = []
    for place, token in enumerate(tokens):
        if token.kind == "string":
            parts.append(_string(token.text))
        elif token.kind == "name" and token.text in constants and not _is_attribute(tokens, place):
            parts.append(json.dumps(constants[token.text] or "", ensure_ascii=False))
        else:
            parts.append(token.text)
    _reverse_slices(parts)
    _python_tests(parts)
    return _spaced(parts)


def _is_attribute(tokens: Sequence[Token], place: int) -> bool:
    before = tokens[place - 1].text if place else ""
    after = tokens[place + 1].text if place + 1 < len(tokens) else ""
    return before in (".", "|", "is") or (after == "=" and before in ("(", ",", "set"))


def _string(literal: str) -> str:
    """The same string with the escapes that both engines read: JSON's, non-ASCII characters as they are."""
    value = literal[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
    return json.dumps(value, ensure_ascii=False)


def _reverse_slices(parts: list[str]) -> None:
    """``x[::-1]`` becomes ``(x|reverse|list)``: minijinja 2.8 has no negative steps."""
    wanted = ["[", ":", ":", "-", "1", "]"]
    place = 0
    while place < len(parts):
        if parts[place : place + 6] == wanted:
            start = _operand(parts, place)
            parts[start : place + 6] = ["(", *parts[start:place], "|", "reverse", "|", "list", ")"]
        place += 1


def _python_tests(parts: list[str]) -> None:
    place = 0
    while place < len(parts):
        negated = parts[place : place + 2] == ["is", "not"]
        test = parts[place + 1 + negated] if parts[place] == "is" and place + 1 + negated < len(parts) else ""
        if test in _TESTS:
            start = _operand(parts, place)
            written = _TESTS[test].format(_spaced(parts[start:place]))
            parts[start : place + 2 + negated] = [f"(not {written})" if negated else written]
            place = start
        place += 1


def _operand(parts: Sequence[str], end: int) -> int:
    """Where the operand that stops before `end` begins: names, attributes, calls, subscripts and filters."""
    place = end - 1
    while True:
        if parts[place] in _OPENERS:
            depth = 0
            while True:
                depth += (parts[place] in _OPENERS) - (parts[place] in _OPENERS.values())
                if depth == 0:
                    break
                place -= 1
            if place and _ends_operand(parts[place - 1]):
                place -= 1
                continue
        if place and parts[place - 1] in (".", "|"):
            place -= 2
            continue
        return place


def _ends_operand(part: str) -> bool:
    keywords = ("in", "is", "not", "and", "or", "if", "elif", "else", "set", "for", "return")
    return part in (")", "]") or part[-1:] == '"' or (part.isidentifier() and part not in keywords)


def _spaced(parts: Sequence[str]) -> str:
    return " ".join(parts)
