"""Two small real corpora with four labelled domains each, for ``upcycle_toy.py``.

* ``topics``: CounselChat's four largest topics. One kind of text, labelled by what it is about: hard to tell apart.
* ``kinds``: CounselChat's answers, Python's language reference, Python source and C++ headers, as they lie on every
  machine with Python and torch: easy to tell apart.
"""

from __future__ import annotations

import csv
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as reference

import torch

CHARACTERS = 420_000
"""Of each kind at most, so that none is much larger than the smallest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """What the base learns, and by domain what branches and mixtures learn and what they are judged on."""

    base: list[str]
    train: dict[str, list[str]]
    test: dict[str, list[str]]


def _rows(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(10**7)
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["topic"] and (row["answerText"] or "").strip()]


def topics(counsel_chat: Path) -> Texts:
    """The base learns the other topics. Held out is every fifth *question* with all its answers."""
    rows = _rows(counsel_chat)
    domains = [topic for topic, _ in Counter(row["topic"] for row in rows).most_common(4)]
    held_out = {
        question
        for domain in domains
        for question in sorted({row["questionID"] for row in rows if row["topic"] == domain})[::5]
    }
    found = Texts(base=[], train={domain: [] for domain in domains}, test={domain: [] for domain in domains})
    for row in rows:
        if row["topic"] in domains:
            (found.test if row["questionID"] in held_out else found.train)[row["topic"]].append(
                row["answerText"]
            )
        elif row["questionID"] not in held_out:
            found.base.append(row["answerText"])
    return found


def kinds(counsel_chat: Path) -> Texts:
    """Of each kind every fifth document is held out and every third of the rest is the base's, so that the base knows
    all four and none by heart."""
    by_question: dict[str, list[str]] = {}
    for row in _rows(counsel_chat):
        by_question.setdefault(row["questionID"], []).append(row["answerText"])
    headers = Path(torch.__file__).parent / "include" / "ATen"
    documents = {
        "answers": ["\n".join(texts) for _, texts in sorted(by_question.items())],
        "reference": [reference[name] for name in sorted(reference)],
        "python": _files(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")),
        "headers": _files(headers.glob("*.h")),
    }
    found = Texts(base=[], train={}, test={})
    for domain, texts in documents.items():
        pieces = _pieces(texts)
        found.test[domain] = pieces[::5]
        rest = [piece for index, piece in enumerate(pieces) if index % 5]
        found.base.extend(rest[::3])
        found.train[domain] = [piece for index, piece in enumerate(rest) if index % 3]
    return found


def _files(paths: object) -> list[str]:
    return [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(paths)]  # type: ignore[call-overload]


def _pieces(texts: list[str], size: int = 4000) -> list[str]:
    """Pieces of ``size`` characters, an even choice over all texts, at most ``CHARACTERS`` together."""
    pieces = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    stride = max(1, sum(map(len, pieces)) // CHARACTERS)
    return pieces[::stride]


CORPORA = {"topics": topics, "kinds": kinds}
