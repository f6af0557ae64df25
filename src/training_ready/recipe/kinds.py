"""The types of keys, and the one place where written text becomes a value of such a type."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from training_ready.recipe.faults import did_you_mean
from training_ready.recipe.tree import Mapping, Node, Scalar, Sequence

_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_TRUE_WORDS = frozenset({"yes", "Yes", "YES", "on", "On", "ON"})
_FALSE_WORDS = frozenset({"no", "No", "NO", "off", "Off", "OFF"})
_INTEGER = re.compile(r"[+-]?[0-9](_?[0-9])*")
_NUMBER = re.compile(r"[+-]?([0-9](_?[0-9])*(\.([0-9](_?[0-9])*)?)?|\.[0-9](_?[0-9])*)([eE][+-]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[+-]?0[0-9_]+")
_NAMES = {str: "str", int: "int", float: "float", bool: "bool", dict: "mapping", list: "list"}
_IN_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "mapping": "a mapping",
    "list": "a list",
    "any": "any value",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a key may hold.

    ``types`` are among str, int, float, bool, mapping, list, any; ``items`` is the kind inside a list or mapping.
    """

    types: tuple[str, ...]
    nullable: bool = False
    choices: tuple[Any, ...] | None = None
    items: Kind | None = None

    def describe(self) -> str:
        """The kind in words: ``one of 'bfd', 'wrapped'`` or ``a whole number or null``."""
        if self.choices:
            words = ["one of " + ", ".join(repr(choice) for choice in self.choices)]
        else:
            words = [_IN_WORDS[name] for name in self.types]
        if self.items is not None and self.items.types != ("any",):
            words[-1] += " of " + self.items.describe()
        return " or ".join([*words, "null"] if self.nullable else words)


class Mismatch(Exception):
    """A value that is not of its kind. ``path`` is relative to the value; ``node`` is the part at fault."""

    def __init__(self, message: str, node: Node, path: str = "") -> None:
        super().__init__(message)
        self.message, self.node, self.path = message, node, path

    def below(self, step: str) -> Mismatch:
        joint = "" if self.path.startswith("[") or not self.path else "."
        return Mismatch(self.message, self.node, step + joint + self.path)


# --------------------------------------------------------------------------- annotations to kinds
def kind_of(annotation: Any) -> Kind:
    """The kind of a type annotation. Raises ``TypeError`` on one that the recipe language does not know."""
    alternatives = list(_alternatives(annotation))
    nullable = type(None) in alternatives
    alternatives = [one for one in alternatives if one is not type(None)]
    choices = _choices(alternatives)
    names: list[str] = []
    items: Kind | None = None
    for one in alternatives:
        name, inner = _name_of(one)
        items = inner or items
        names += [name] if name not in names else []
    return Kind(types=tuple(names), nullable=nullable, choices=choices, items=items)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [one for arg in get_args(annotation) for one in _alternatives(arg)]
    return [annotation]


def _choices(alternatives: list[Any]) -> tuple[Any, ...] | None:
    """The allowed values, when enums or literals say all of them (``Enum | str``: the enum's only)."""
    found: list[Any] = []
    for one in alternatives:
        if get_origin(one) is Literal:
            found += get_args(one)
        elif isinstance(one, type) and issubclass(one, enum.Enum):
            found += [member.value for member in one]
        elif one is not str or not any(
            isinstance(x, type) and issubclass(x, enum.Enum) for x in alternatives
        ):
            return None
    return tuple(dict.fromkeys(found)) or None


def _name_of(one: Any) -> tuple[str, Kind | None]:
    origin = get_origin(one)
    if one is Any or one is object:
        return "any", None
    if origin is Literal:
        return _NAMES[type(get_args(one)[0])], None
    if origin is list:
        return "list", kind_of(get_args(one)[0])
    if origin is dict:
        return "mapping", kind_of(get_args(one)[1])
    if one in _NAMES:
        return _NAMES[one], None
    if isinstance(one, type) and issubclass(one, enum.Enum):
        return _NAMES[type(next(iter(one)).value)], None
    if dataclasses.is_dataclass(one) or hasattr(one, "model_fields"):
        return "mapping", None
    raise TypeError(f"the recipe language has no kind for {one!r}")


# --------------------------------------------------------------------------- written text to values
def coerce(node: Node, kind: Kind) -> Any:
    """The value of ``node`` as ``kind``. Raises ``Mismatch`` saying what is allowed, or nothing if that was said."""
    if isinstance(node, Scalar) and node.faulty:
        raise Mismatch("", node)
    if "any" in kind.types:
        return _untyped(node)
    if isinstance(node, Mapping):
        return _mapping(node, kind)
    if isinstance(node, Sequence):
        return _list(node, kind)
    if node.is_null:
        if kind.nullable:
            return None
        raise Mismatch(f"is null; expected {kind.describe()}", node)
    value = _scalar(node, kind)
    if kind.choices is not None and value not in kind.choices:
        hint = did_you_mean(node.text, [str(choice) for choice in kind.choices], most=1)
        raise Mismatch(
            f"{node.text!r} is not allowed; expected {kind.describe()}" + (f"; {hint}" if hint else ""), node
        )
    return value


def _mapping(node: Mapping, kind: Kind) -> dict[str, Any]:
    if "mapping" not in kind.types:
        raise Mismatch(f"is a mapping; expected {kind.describe()}", node)
    found = {}
    for name, child in node.entries.items():
        try:
            found[name] = coerce(child, kind.items or Kind(("any",)))
        except Mismatch as mismatch:
            raise mismatch.below(name) from None
    return found


def _list(node: Sequence, kind: Kind) -> list[Any]:
    if "list" not in kind.types:
        raise Mismatch(f"is a list; expected {kind.describe()}", node)
    found = []
    for index, child in enumerate(node.items):
        try:
            found.append(coerce(child, kind.items or Kind(("any",))))
        except Mismatch as mismatch:
            raise mismatch.below(f"[{index}]") from None
    return found


def _scalar(node: Scalar, kind: Kind) -> Any:
    text = node.text.strip() if node.plain else node.text
    wants_text = "str" in kind.types
    typed = node.plain or not wants_text  # "4" in quotes is text wherever text is allowed
    if typed and "bool" in kind.types:
        if text in _TRUE or (not wants_text and text in _TRUE_WORDS):
            return True
        if text in _FALSE or (not wants_text and text in _FALSE_WORDS):
            return False
    if typed and "int" in kind.types and _INTEGER.fullmatch(text):
        return _whole(text, node)
    if typed and "float" in kind.types and _NUMBER.fullmatch(text):
        return _finite(text, node)
    if wants_text:
        return node.text
    if "list" in kind.types and kind.items is not None and "str" in kind.items.types:
        return [coerce(node, kind.items)]
    shown = "an empty text" if not text else repr(text)
    near = (
        "; write it without a decimal point or exponent"
        if "int" in kind.types and _NUMBER.fullmatch(text)
        else ""
    )
    raise Mismatch(f"is {shown}; expected {kind.describe()}{near}", node)


def _whole(text: str, node: Scalar) -> int:
    if _LEADING_ZERO.fullmatch(text):
        raise Mismatch(
            f"{text!r} starts with 0, which YAML 1.1 reads as octal; write the decimal number", node
        )
    return int(text.replace("_", ""))


def _finite(text: str, node: Scalar) -> float:
    value = float(text.replace("_", ""))
    if value in (float("inf"), float("-inf")):
        raise Mismatch(f"{text!r} is too large for a floating-point number", node)
    return value


def _untyped(node: Node) -> Any:
    """A value inside a key without types of its own (``model_init_kwargs``, ``model.config``): YAML 1.2 rules."""
    if isinstance(node, Mapping):
        return _mapping(node, Kind(("mapping",)))
    if isinstance(node, Sequence):
        return _list(node, Kind(("list",)))
    if not node.plain:
        return node.text
    text = node.text.strip()
    if node.is_null:
        return None
    if text in _TRUE | _FALSE:
        return text in _TRUE
    if text in _TRUE_WORDS | _FALSE_WORDS:
        raise Mismatch(
            f"{text!r} is a boolean to some readers of YAML and text to others; write true, false or quotes",
            node,
        )
    if _INTEGER.fullmatch(text):
        return _whole(text, node)
    if _NUMBER.fullmatch(text):
        return _finite(text, node)
    return node.text
