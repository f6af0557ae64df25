"""How do parts of corpora become one plan? Their rows chosen, their weights turned into packs, their packs counted."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from training_ready.storage.objects import ObjectNotFound
from training_ready.stream.blocks import BlockReader
from training_ready.stream.groups import PackReader
from training_ready.stream.index import wanted_cells
from training_ready.stream.lanes import Chapter
from training_ready.stream.line import NoRowsError, PackLine
from training_ready.stream.mixture import pack_shares, quotas, shares
from training_ready.stream.plan import PackPlan
from training_ready.stream.shards import StreamError
from training_ready.stream.token_set import TokenSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows that share a weight.

    ``sources``, ``stages``, ``components``: rows in all given lists; None takes all. ``weight``: None for the part's
    own size. ``max_epochs``: passes after which the part is used up.
    """

    tokens: TokenSet
    sources: Sequence[str] | None = None
    stages: Sequence[str] | None = None
    components: Sequence[str] | None = None
    weight: float | None = None
    max_epochs: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Everything else that decides which packs come and when.

    ``epochs``: end after as many packs as that many passes over all parts hold; None goes on for ever.
    ``curriculum``: (position, weights) of later mixtures; parts that are not named keep their weight.
    """

    max_length: int
    seed: int
    packing: bool = True
    blocks_per_group: int = 8
    lanes: int = 1
    by: Literal["tokens", "rows"] = "tokens"
    temperature: float = 1.0
    epochs: float | None = None
    curriculum: Sequence[tuple[int, Mapping[str, float]]] = field(default_factory=tuple)
    shuffle: bool = True


def pack_reader(parts: Mapping[str, Part], order: Order, *, remember: bool = True) -> PackReader:
    """The packs of the parts in their order.

    Args:
        remember: keep the number of packs per group in the bucket, so that the next start need not count them.

    Raises:
        StreamError: a part is empty, two parts share rows, or the weights make no mixture.
    """
    _refuse_early(parts, order)
    _refuse_overlap(parts)
    lines = {name: _line(name, part, order, remember) for name, part in parts.items()}
    plan = PackPlan(
        lines,
        chapters=_chapters(parts, lines, order),
        lanes=order.lanes,
        limits=[
            None if part.max_epochs is None else math.ceil(part.max_epochs * line.packs_per_epoch)
            for part, line in zip(parts.values(), lines.values(), strict=True)
        ],
        total=None
        if order.epochs is None
        else math.ceil(order.epochs * sum(line.packs_per_epoch for line in lines.values())),
    )
    readers: dict[int, BlockReader] = {}
    for part in parts.values():
        readers.setdefault(id(part.tokens), BlockReader(part.tokens.store, part.tokens))
    return PackReader(plan, [readers[id(part.tokens)] for part in parts.values()])


class Limited(Protocol):
    """What may be used up after some passes."""

    @property
    def max_epochs(self) -> float | None: ...


def needs_no_counts(parts: Collection[Limited], *, epochs: float | None) -> bool:
    """Whether an order of these parts can begin before all packs are counted.

    Epochs, limits of passes and the shares of a mixture are numbers of packs.
    """
    return len(parts) == 1 and epochs is None and all(part.max_epochs is None for part in parts)


def _refuse_early(parts: Mapping[str, Part], order: Order) -> None:
    if any(part.tokens.begins_early for part in parts.values()) and not (
        order.shuffle and needs_no_counts(parts.values(), epochs=order.epochs)
    ):
        raise StreamError(
            "epochs, limits and mixtures need every pack counted: tokenise all of a split first"
        )


def _cells(part: Part) -> frozenset[int]:
    return wanted_cells(
        part.tokens.index, sources=part.sources, stages=part.stages, components=part.components
    )


def _refuse_overlap(parts: Mapping[str, Part]) -> None:
    named = list(parts.items())
    for at, (name, part) in enumerate(named):
        for other_name, other in named[:at]:
            if other.tokens.fingerprint != part.tokens.fingerprint:
                continue
            shared = _cells(part) & _cells(other)
            if shared:
                cell = part.tokens.index.cells[min(shared)]
                raise StreamError(
                    f"stream.mixture: {other_name!r} and {name!r} both hold the rows of source {cell.source!r} in "
                    f"{cell.stage}"
                    + (f" with {', '.join(cell.components)}" if cell.components else "")
                    + ", so they "
                    "would count twice. Narrow one of them by sources, stages or components."
                )


def _line(name: str, part: Part, order: Order, remember: bool) -> PackLine:
    tokens = part.tokens

    def key_of(fingerprint: str) -> str:
        return f"{tokens.prefix}/packs-{fingerprint[:40]}.json"

    def counted(fingerprint: str) -> list[int] | None:
        try:
            known: list[int] = json.loads(tokens.store.get_bytes(key_of(fingerprint)))
        except ObjectNotFound:
            return None
        return known

    def keep(fingerprint: str, packs: Sequence[int]) -> None:
        if remember:
            tokens.store.put_bytes(key_of(fingerprint), json.dumps(packs).encode())

    try:
        return PackLine(
            tokens,
            max_length=order.max_length,
            seed=order.seed,
            sources=part.sources,
            stages=part.stages,
            components=part.components,
            packing=order.packing,
            blocks_per_group=order.blocks_per_group,
            shuffle=order.shuffle,
            counted=counted,
            keep=keep,
        )
    except NoRowsError as error:
        found = sorted({(cell.source, cell.stage) for cell in tokens.index.cells})
        raise StreamError(f"{name}: {error}. {tokens.name} holds (source, stage): {found}") from error


def _chapters(parts: Mapping[str, Part], lines: Mapping[str, PackLine], order: Order) -> list[Chapter]:
    if len(parts) == 1 and not order.curriculum:
        return [Chapter(start=0, quota=tuple(quotas(np.ones(1), list(parts))))]
    column = {"rows": 0, "tokens": 1}[order.by]
    sizes = np.asarray([line.epoch_counts[:, column].sum() for line in lines.values()], dtype=np.float64)
    packs = np.asarray([line.packs_per_epoch for line in lines.values()])
    unweighted = [name for name, part in parts.items() if part.weight is None]
    if 0 < len(unweighted) < len(parts):
        raise StreamError(
            f"stream.mixture: {', '.join(unweighted)} has no weight and the others have. Weigh all parts, or none: "
            "each then counts with its own size"
        )
    weights = {
        name: float(size) if part.weight is None else part.weight
        for (name, part), size in zip(parts.items(), sizes, strict=True)
    }
    chapters: list[Chapter] = []
    for start, changed in [(0, {}), *order.curriculum]:
        unknown = sorted(set(changed) - set(parts))
        if unknown:
            raise StreamError(
                f"stream.curriculum: {', '.join(unknown)} is no part of stream.mixture ({', '.join(parts)})"
            )
        weights |= changed
        if not sum(weights.values()):
            raise StreamError(f"stream.mixture: every weight is 0 from position {start} on")
        if start % order.lanes:
            raise StreamError(
                f"a mixture cannot begin at position {start}: not a multiple of {order.lanes} lanes"
            )
        wanted = shares(list(weights.values()), order.temperature)
        quota = quotas(pack_shares(wanted, sizes / packs), list(parts))
        chapter = Chapter(start=start // order.lanes, quota=tuple(quota))
        if chapters and chapters[-1].start == chapter.start:
            chapters.pop()
        chapters.append(chapter)
    return chapters
