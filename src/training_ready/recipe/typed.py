"""From the written tree to typed values: TRL's keys, our sections, the environment. Each is coerced once, here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from training_ready.recipe.faults import Fault, Origin, did_you_mean
from training_ready.recipe.kinds import Kind, Mismatch, coerce, kind_of
from training_ready.recipe.legacy import GONE
from training_ready.recipe.sections import SECTIONS, Section
from training_ready.recipe.tree import Mapping, Node, Scalar, Sequence, leaves
from training_ready.recipe.trl_keys import CORPUS_INSTEAD, RANGES, TrlKey, settled, trl_keys


@dataclass(kw_only=True, slots=True)
class Typed:
    """Everything a recipe sets, typed, with where it was written and what was wrong."""

    trl: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Section] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)


def type_tree(tree: Mapping) -> Typed:
    """Type every key of the tree. ``broken`` names the keys and sections that have a fault."""
    typed = Typed()
    for name, node in tree.entries.items():
        if name in SECTIONS:
            _section(name, node, typed)
        elif name == "env":
            _environment(node, typed)
        elif name in CORPUS_INSTEAD:
            message = "not supported yet: build a corpus with `training-ready data build` and name it in `data.corpus`"
            _fault(typed, node.origin, name, message)
        elif name in trl_keys():
            _trl_key(trl_keys()[name], node, typed)
        else:
            _fault(typed, node.origin, name, _unknown(name))
    typed.trl = {name: typed.trl[name] for name in trl_keys() if name in typed.trl}
    return typed


def _fault(typed: Typed, origin: Origin, key: str, message: str) -> None:
    typed.faults.append(Fault(origin, key, message))
    typed.broken.add(_first(key))


def _first(key: str) -> str:
    """The top-level key of a dotted one."""
    return key.partition(".")[0].partition("[")[0]


def _unknown(name: str) -> str:
    if name in GONE:
        return f"is unknown: {GONE[name]}; `training-ready recipe migrate FILE` translates an older recipe"
    hint = did_you_mean(name, [*trl_keys(), *SECTIONS, "env", "extends"])
    for section, model in SECTIONS.items():
        if name in model.model_fields:
            hint = f"did you mean `{section}.{name}`?"
    return "is unknown; " + (hint or "`training-ready recipe schema` lists every key")


# --------------------------------------------------------------------------- TRL's keys
def _trl_key(key: TrlKey, node: Node, typed: Typed) -> None:
    if isinstance(node, Scalar) and node.removes and not key.kind.nullable:
        return  # null over an inherited value: back to TRL's default
    try:
        value = settled(key.name, coerce(node, key.kind))
    except Mismatch as mismatch:
        _mismatch(key.name, mismatch, typed)
        return
    bounds = RANGES.get(key.name)
    if bounds is not None and isinstance(value, int | float) and not bounds.holds(value):
        _fault(typed, node.origin, key.name, f"is {value}; expected {bounds.describe()}")
        return
    typed.trl[key.name] = value
    _locate(key.name, node, typed)


def _mismatch(key: str, mismatch: Mismatch, typed: Typed) -> None:
    joint = "" if mismatch.path.startswith("[") or not mismatch.path else "."
    if isinstance(mismatch.node, Scalar) and mismatch.node.faulty:
        typed.broken.add(_first(key))
        return
    _fault(typed, mismatch.node.origin, key + joint + mismatch.path, mismatch.message)


# --------------------------------------------------------------------------- the environment
def _environment(node: Node, typed: Typed) -> None:
    if isinstance(node, Scalar) and node.is_null:
        return
    if not isinstance(node, Mapping):
        _fault(typed, node.origin, "env", "expected a mapping of variable names to values")
        return
    for name, child in node.entries.items():
        if isinstance(child, Scalar) and child.removes:
            continue
        if not (name.isidentifier() and name.isascii()):
            _fault(typed, child.origin, f"env.{name}", "is not the name of an environment variable")
            continue
        try:
            typed.env[name] = str(coerce(child, Kind(("str",))))
            typed.origins[f"env.{name}"] = child.origin
        except Mismatch as mismatch:
            _mismatch(f"env.{name}", mismatch, typed)


# --------------------------------------------------------------------------- our sections
def _section(name: str, node: Node, typed: Typed) -> None:
    model = SECTIONS[name]
    if isinstance(node, Scalar) and node.is_null:
        node = Mapping(origin=node.origin)
    values = _fields(model, node, name, typed)
    if name in typed.broken:
        return
    try:
        typed.sections[name] = model.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            _invalid(name, node, detail, typed)


def _fields(model: type[BaseModel], node: Node, path: str, typed: Typed) -> dict[str, Any]:
    """The values of a section, coerced field by field; faults go to ``typed``."""
    if isinstance(node, Scalar) and node.faulty:
        typed.broken.add(_first(path))
        return {}
    if not isinstance(node, Mapping):
        _fault(typed, node.origin, path, f"expected a mapping with the keys {_listed(model.model_fields)}")
        return {}
    values: dict[str, Any] = {}
    for name, child in node.entries.items():
        dotted = f"{path}.{name}"
        info = model.model_fields.get(name)
        if info is None:
            hint = did_you_mean(name, model.model_fields) or _elsewhere(name)
            known = f"`{path}` has the keys {_listed(model.model_fields)}"
            _fault(typed, child.origin, dotted, f"is unknown; {hint or known}")
            continue
        kind = kind_of(info.annotation)
        nested = nested_section(info.annotation)
        if isinstance(child, Scalar) and child.removes and not kind.nullable:
            continue
        if nested is not None and not (isinstance(child, Scalar) and child.is_null):
            values[name] = _fields(nested, child, dotted, typed)
        else:
            try:
                values[name] = coerce(child, kind)
            except Mismatch as mismatch:
                _mismatch(dotted, mismatch, typed)
        _locate(dotted, child, typed)
    return values


def _locate(key: str, node: Node, typed: Typed) -> None:
    """Note where a key was written, and everything inside it."""
    typed.origins[key] = node.origin
    typed.origins.update({path: leaf.origin for path, leaf in leaves(node, key)})


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation such as ``OvhSection | None`` names, or None."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _elsewhere(name: str) -> str:
    return f"`{name}` is a key of TRL: write it at the top level" if name in trl_keys() else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _invalid(section: str, node: Node, detail: ErrorDetails, typed: Typed) -> None:
    """A constraint that pydantic found broken, as a fault at the line of the key."""
    key, at = section, node
    for step in detail["loc"]:
        key += f"[{step}]" if isinstance(step, int) else f".{step}"
        if isinstance(at, Mapping) and str(step) in at.entries:
            at = at.entries[str(step)]
        elif isinstance(at, Sequence) and isinstance(step, int) and step < len(at.items):
            at = at.items[step]
    if detail["type"] == "missing":
        _fault(typed, at.origin, key, "is missing")
        return
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = f"is {detail['input']!r}; " if isinstance(detail["input"], int | float | str) else ""
    _fault(typed, at.origin, key, f"{shown}{message}")
