"""Does the serving engine write the prompt that was trained? A chat template made explicit for minijinja.

Training renders with Jinja, ``trim_blocks`` and ``lstrip_blocks`` on; TGI's router renders with minijinja 2.8, both
off, and knows neither ``{% generation %}`` nor everything that Jinja's expressions can say (:mod:`.template_rules`).
Jinja's own lexer applies the whitespace rules here, so that the written template says the same in both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from training_ready.release.export import ExportError
from training_ready.release.targets.render import wants_parts
from training_ready.release.targets.template_rules import RULES, operand

# Before a template that knows lists of parts only: an engine passes a text as it is.
_TEXT_IN_PARTS = (
    "{%- set turns_in_parts = namespace(all=[]) -%}"
    "{%- for turn in messages -%}"
    "{%- set part = {'role': turn.role, 'content': [{'type': 'text', 'text': turn.content}]} -%}"
    "{%- set turns_in_parts.all = turns_in_parts.all + [part if turn.content is string else turn] -%}"
    "{%- endfor -%}"
    "{%- set messages = turns_in_parts.all %}"
)


class Token(NamedTuple):
    kind: str
    text: str


def normalise(template: str, constants: Mapping[str, str | None] | None = None) -> str:
    """The template with its whitespace rules applied, written so that Jinja and minijinja render it alike.

    `constants` are names that the engine does not pass; they become literals (None: the empty string).

    Raises ExportError when `template` is not Jinja.
    """

    def expression(tokens: Sequence[Token]) -> list[str]:
        parts = _parts(tokens, constants or {})
        for rule in RULES:
            rule(parts)
        return parts

    return _rewritten(template, expression)


def taking_text(template: str, special: Mapping[str, str]) -> str:
    """The template, to be given texts: one that knows lists of parts only makes them itself."""
    return _TEXT_IN_PARTS + template if wants_parts(template, special) else template


def methods_as_calls(template: str, methods: Collection[str], function: str) -> str:
    """``x.strip()`` as ``function(x, "strip")``, for a minijinja without Python's methods."""

    def expression(tokens: Sequence[Token]) -> list[str]:
        parts = _parts(tokens, {})
        place = 1
        while place < len(parts) - 2:
            dot, name, opening = parts[place : place + 3]
            if dot == "." and name in methods and opening == "(":
                start = operand(parts, place)
                comma = [] if parts[place + 3] == ")" else [","]
                call = [function, "(", *parts[start:place], ",", json.dumps(name), *comma]
                parts[start : place + 3] = call
            place += 1
        return parts

    return _rewritten(template, expression)


def _rewritten(template: str, expression: Callable[[Sequence[Token]], list[str]]) -> str:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        tokens = [Token(kind, text) for _, kind, text in environment.lex(template)]
    except TemplateSyntaxError as error:
        raise ExportError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from error
    return "".join(_written(tokens, expression))


def _written(tokens: Sequence[Token], expression: Callable[[Sequence[Token]], list[str]]) -> Iterator[str]:
    text = ""
    for kind, inner in _tags(tokens):
        if kind == "data":
            text += inner[0].text
        elif kind == "variable":
            yield _literal_text(text) + f"{{{{ {' '.join(expression(inner))} }}}}"
            text = ""
        elif inner[0].text not in ("generation", "endgeneration"):
            # "+" keeps Jinja from applying the rules a second time.
            yield _literal_text(text) + f"{{%+ {' '.join(expression(inner))} +%}}"
            text = ""
    yield _literal_text(text, last=True)


def _tags(tokens: Sequence[Token]) -> Iterator[tuple[str, list[Token]]]:
    """("data", text), ("block", its tokens) and ("variable", its tokens); comments are left out."""
    inner: list[Token] = []
    for token in tokens:
        if token.kind == "data":
            yield "data", [token]
        elif token.kind in ("block_begin", "variable_begin"):
            inner = []
        elif token.kind in ("block_end", "variable_end"):
            yield token.kind.removesuffix("_end"), inner
        elif token.kind != "whitespace":
            inner.append(token)


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


def _parts(tokens: Sequence[Token], constants: Mapping[str, str | None]) -> list[str]:
    """The tokens as text, strings escaped alike for both engines, constants in place."""
    parts: list[str] = []
    for place, token in enumerate(tokens):
        if token.kind == "string":
            parts.append(_string(token.text))
        elif token.kind == "name" and token.text in constants and not _is_attribute(tokens, place):
            parts.append(json.dumps(constants[token.text] or "", ensure_ascii=False))
        else:
            parts.append(token.text)
    return parts


def _is_attribute(tokens: Sequence[Token], place: int) -> bool:
    before = tokens[place - 1].text if place else ""
    after = tokens[place + 1].text if place + 1 < len(tokens) else ""
    return before in (".", "|", "is") or (after == "=" and before in ("(", ",", "set"))


def _string(literal: str) -> str:
    """The same string with the escapes that both engines read: JSON's, non-ASCII characters as they are."""
    value = literal[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
    return json.dumps(value, ensure_ascii=False)
