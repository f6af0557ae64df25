"""Which expressions of Jinja does minijinja 2.8 not have, and how are they said in both?

A rule changes the tokens of one tag, a list of strings, in place. What it writes means the same to Jinja.
"""

from __future__ import annotations

from collections.abc import Sequence

_CLOSERS = {")": "(", "]": "[", "}": "{"}
_KEYWORDS = ("in", "is", "not", "and", "or", "if", "elif", "else", "set", "for", "return")
# What a minijinja that follows Rust's notion of a sequence would answer differently from Python's.
_TESTS = {
    "iterable": "(({0} is iterable or {0} is string) and {0} is not none)",
    "sequence": "({0} is sequence or {0} is string or {0} is mapping)",
}


def operand(parts: Sequence[str], end: int) -> int:
    """Where the operand that stops before `end` begins: names, attributes, calls, subscripts and filters."""
    place = end - 1
    while True:
        if parts[place] in _CLOSERS:
            place = _opening(parts, place)
            if place and _ends_operand(parts[place - 1]):
                place -= 1
                continue
        if place and parts[place - 1] in (".", "|"):
            place -= 2
            continue
        return place


def reverse_slices(parts: list[str]) -> None:
    """``x[::-1]`` becomes ``(x|reverse|list)``: there are no negative steps."""
    place = 0
    while place < len(parts):
        if parts[place : place + 6] == ["[", ":", ":", "-", "1", "]"]:
            start = operand(parts, place)
            parts[start : place + 6] = ["(", *parts[start:place], "|", "reverse", "|", "list", ")"]
        place += 1


def backward_ranges(parts: list[str]) -> None:
    """``range(a, b, -1)`` becomes ``(range(b + 1, a + 1)|reverse|list)``."""
    for place in range(len(parts) - 2, -1, -1):
        if parts[place : place + 2] == ["range", "("]:
            end, given = _arguments(parts, place + 1)
            if len(given) == 3 and given[2] == ["-", "1"]:
                first, last, _ = given
                turned = ["range", "(", *last, "+", "1", ",", *first, "+", "1", ")"]
                parts[place : end + 1] = ["(", *turned, "|", "reverse", "|", "list", ")"]


def boolean_defaults(parts: list[str]) -> None:
    """``x|default(y, true)`` becomes ``(x or y)``: the filter takes one argument."""
    place = 1
    while place < len(parts) - 2:
        if parts[place] == "|" and parts[place + 1] in ("default", "d") and parts[place + 2] == "(":
            end, given = _arguments(parts, place + 2)
            if len(given) == 2 and given[1] in (["true"], ["True"], ["boolean", "=", "true"]):
                start = operand(parts, place)
                parts[start : end + 1] = ["(", *parts[start:place], "or", *given[0], ")"]
                place = start
        place += 1


def keyword_conditions(parts: list[str]) -> None:
    """``f(x=a if b else c)`` becomes ``f(x=(a if b else c))``."""
    for place in range(len(parts) - 1, -1, -1):
        if parts[place] == "(" and place and _ends_operand(parts[place - 1]):
            end, given = _arguments(parts, place)
            written: list[str] = []
            for argument in given:
                bare = argument[1:2] == ["="] and "if" in argument
                argument = [*argument[:2], "(", *argument[2:], ")"] if bare else argument
                written += [",", *argument] if written else argument
            parts[place + 1 : end] = written


def python_tests(parts: list[str]) -> None:
    """``is iterable`` and ``is sequence`` as Python means them: text is both, none is neither."""
    place = 0
    while place < len(parts):
        negated = parts[place : place + 2] == ["is", "not"]
        test = parts[place + 1 + negated] if parts[place] == "is" and place + 1 + negated < len(parts) else ""
        if test in _TESTS:
            start = operand(parts, place)
            written = _TESTS[test].format(" ".join(parts[start:place]))
            parts[start : place + 2 + negated] = [f"(not {written})" if negated else written]
            place = start
        place += 1


RULES = (reverse_slices, backward_ranges, boolean_defaults, keyword_conditions, python_tests)


def _opening(parts: Sequence[str], place: int) -> int:
    """The bracket that the one at `place` closes."""
    depth = 0
    while True:
        depth += (parts[place] in _CLOSERS) - (parts[place] in _CLOSERS.values())
        if depth == 0:
            return place
        place -= 1


def _arguments(parts: Sequence[str], opening: int) -> tuple[int, list[list[str]]]:
    """Where the call closes, and its arguments."""
    depth = 0
    given: list[list[str]] = [[]]
    for place in range(opening, len(parts)):
        depth += (parts[place] in _CLOSERS.values()) - (parts[place] in _CLOSERS)
        if depth == 0:
            return place, [argument for argument in given if argument]
        if depth == 1 and parts[place] == ",":
            given.append([])
        elif place > opening:
            given[-1].append(parts[place])
    return len(parts) - 1, []


def _ends_operand(part: str) -> bool:
    return part in (")", "]") or part[-1:] == '"' or (part.isidentifier() and part not in _KEYWORDS)
