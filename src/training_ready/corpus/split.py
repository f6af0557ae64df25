"""Is this conversation for training or for judging? One split per group, the same in every build."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from training_ready.corpus.candidates import Candidate
from training_ready.corpus.record import SPLITS, Split


class SplitPlan:
    """Decides the split of every candidate; rows that share a group never part.

    In order: a hold-out family goes to test; a group whose publisher named splits goes to the most held-out of them
    (test before val before train); any other group goes where a hash of the seed and its name falls, so that
    adding rows moves nothing that was there before, unless they join two groups into one.

    Groups that are joined or have a publisher's split must be shown to :meth:`observe` first (a pass over the source);
    they cost some 200 bytes each. All others cost nothing.
    """

    def __init__(
        self, shares: Mapping[Split, float], *, seed: int, holdout_families: Collection[str]
    ) -> None:
        self._shares = [(split, shares.get(split, 0.0)) for split in SPLITS]
        self._seed = seed
        self._holdout = frozenset(holdout_families)
        self._parent: dict[bytes, bytes] = {}
        self._published: dict[bytes, Split] = {}

    def observe(self, candidate: Candidate) -> None:
        """First pass: joins the candidate's groups and remembers its publisher's split."""
        root, *others = {self._root(group) for group in candidate.groups}
        for other in others:
            root = self._join(root, other)
        self._hold_out(root, candidate.publisher_split)

    def split_of(self, candidate: Candidate) -> Split:
        """Second pass: the split of the candidate's group."""
        if candidate.family in self._holdout:
            return "test"
        root = self._root(candidate.groups[0])
        return self._published.get(root) or self._by_hash(root)

    def _by_hash(self, group: bytes) -> Split:
        digest = hashlib.sha256(f"{self._seed}:".encode() + group).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        for split, share in self._shares:
            if point < share:
                return split
            point -= share
        return "train"  # the shares add up to 1 but for rounding

    def _root(self, group: bytes) -> bytes:
        path = []
        while (parent := self._parent.get(group, group)) != group:
            path.append(group)
            group = parent
        for passed in path:
            self._parent[passed] = group
        return group

    def _join(self, one: bytes, other: bytes) -> bytes:
        """The smaller name leads, so that the order of the rows does not matter."""
        root, joined = sorted((one, other))
        self._parent[joined] = root
        self._hold_out(root, self._published.pop(joined, None))
        return root

    def _hold_out(self, root: bytes, split: Split | None) -> None:
        if split is not None:
            self._published[root] = max(split, self._published.get(root, split), key=SPLITS.index)
