"""In which order do rows come? A pure function of (blocks, seed, epoch), computed and never buffered.

::

    blocks of a split    0 1 2 3 4 5 6 7          (a block = one row group of the corpus)
    permuted, by seed    5 2 7 0 3 6 1 4
    groups of 4          A=[5 2 7 0] B=[3 6 1 4]  (read together, their rows share packs)
    groups, by epoch     epoch 0: A B   epoch 1: B A   epoch 2: ...
    rows and packs       permuted inside the group, anew in every epoch

An order that begins early deals the permuted blocks to rounds of 1, 1, 2, 4, 8, … first, makes groups inside the
rounds, and reads them round by round in epoch 0; so its beginning is known when one block is. Epoch 1 is as above.

A shuffle buffer holds rows that a resumed run has lost; here there is nothing to save but a position
(https://github.com/huggingface/datasets/issues/7901).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# What a generator is for; each purpose draws from a stream of its own.
BLOCKS, GROUPS, ROWS, ROUNDS = 0, 1, 2, 3


def generator(seed: int, *purpose: int) -> np.random.Generator:
    """An independent random generator for each (seed, purpose...), the same on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *purpose])))


def early_rounds(blocks: int, *, seed: int) -> list[Indices]:
    """All blocks, permuted, in rounds of 1, 1, 2, 4, 8, …: what comes before a round is half of what is there then."""
    order, borders = generator(seed, ROUNDS).permutation(blocks), [0, 1]
    while borders[-1] < blocks:
        borders.append(2 * borders[-1])
    return [order[begin:end] for begin, end in pairwise(borders)]


def block_groups(
    blocks: Indices, blocks_per_group: int, *, seed: int, round: int = 0, shuffle: bool = True
) -> list[Indices]:
    """The blocks of a round in groups that are held in memory together; the same groups in every epoch."""
    order = generator(seed, BLOCKS, round).permutation(blocks) if shuffle else blocks
    return [order[start : start + blocks_per_group] for start in range(0, len(order), blocks_per_group)]


def group_order(groups: int, *, seed: int, epoch: int, shuffle: bool = True) -> Indices:
    """The groups of one epoch in reading order."""
    return generator(seed, GROUPS, epoch).permutation(groups) if shuffle else np.arange(groups)
