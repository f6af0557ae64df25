"""In which order do rows come? A pure function of (number of blocks, seed, epoch), computed and never buffered.

::

    blocks of a split   0 1 2 3 4 5 6 7          (a block = one row group of a token shard)
    permuted            5 2 7 0 3 6 1 4
    groups of 4         [5 2 7 0] [3 6 1 4]      (read together)
    rows inside         permuted over the group

A shuffle buffer holds rows that a resumed run has lost; here there is nothing to save but a position
(https://github.com/huggingface/datasets/issues/7901).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def generator(seed: int, *purpose: int) -> np.random.Generator:
    """An independent random generator for each (seed, purpose...), the same on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *purpose])))


def block_groups(
    blocks: int, blocks_per_group: int, *, seed: int, epoch: int, shuffle: bool = True
) -> list[npt.NDArray[np.int64]]:
    """The blocks of one epoch in reading order, in groups that are held in memory together."""
    order = generator(seed, epoch, 0).permutation(blocks) if shuffle else np.arange(blocks)
    return [order[start : start + blocks_per_group] for start in range(0, blocks, blocks_per_group)]
