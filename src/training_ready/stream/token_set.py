"""Which tokens are there by now? All of a split, or of one that is still being tokenised the rounds that are ready.

::

    order of a plan that begins early    | round 0 | 1 | 2     | 3            | 4 …
    blocks                               | 1       | 1 | 2     | 4            | 8
                                           there          being tokenised ahead
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from training_ready.storage.objects import ObjectStore
from training_ready.stream.index import TokenIndex
from training_ready.stream.order import early_rounds
from training_ready.stream.shards import StreamError


class TokenSet:
    """A split as tokens in a bucket.

    ``index`` lists the blocks in the order of the rounds; ``rounds`` says how many stand before the end of each round
    that is there. A set that does not begin early has one round, in the order of the corpus.
    """

    def __init__(
        self,
        *,
        name: str,
        store: ObjectStore,
        prefix: str,
        index: TokenIndex,
        rounds: Sequence[int] | None = None,
        coming: Iterator[TokenIndex] | None = None,
        blocks: int | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """
        Args:
            prefix: of its objects.
            coming: the rounds after those of ``index``; each comes when it is tokenised.
            blocks: of the whole split; None where ``index`` is all of it.
            fingerprint: of the whole split in the corpus's order; None for that of ``index``.
        """
        self.name, self.store, self.prefix, self.index = name, store, prefix, index
        self.rounds = list(rounds or [len(index.blocks)])
        self.begins_early = rounds is not None
        self.blocks = len(index.blocks) if blocks is None else blocks
        self.fingerprint = fingerprint or index.fingerprint
        self._coming = coming or iter(())

    @classmethod
    def early(cls, *, name: str, store: ObjectStore, prefix: str, index: TokenIndex, seed: int) -> TokenSet:
        """All of a split, in the rounds of an order that begins early; ``index`` is in the corpus's order."""
        order = early_rounds(len(index.blocks), seed=seed)
        return cls(
            name=name,
            store=store,
            prefix=prefix,
            index=index.in_order(np.concatenate(order)),
            rounds=np.cumsum([len(one) for one in order]).tolist(),
            fingerprint=index.fingerprint,
        )

    @property
    def complete(self) -> bool:
        return len(self.index.blocks) == self.blocks

    def grow(self) -> None:
        """Waits for the next round. Raises StreamError where a row cannot be tokenised."""
        part = next(self._coming, None)
        if part is None:
            raise StreamError(f"{self.name}: tokenising has failed before, so no more rows come; start again")
        self.index = TokenIndex.joined([self.index, part])
        self.rounds.append(len(self.index.blocks))
