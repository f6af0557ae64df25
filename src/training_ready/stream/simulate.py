"""Would the plan hold on so many ranks? Counted from the plan alone, without reading a token.

Every position of the first steps is dealt out as the ranks would deal it: each pack must come once, every rank must get
equally many, and a rank fetches a group when a lane of its enters it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from training_ready.stream.plan import PackPlan
from training_ready.stream.shards import StreamError

# Soft limits of an OVHcloud bucket (help.ovhcloud.com KB0047376, 18 February 2026).
GETS_PER_SECOND = 900  # and as many HEADs
BYTES_PER_CONNECTION = 125_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What the ranks would do in ``steps`` optimizer steps; pairs are (least, most) over the ranks.

    ``blocks``: fetched by all ranks. ``reads_per_byte``: their bytes, divided by the bytes of the groups they touch
    together.
    """

    ranks: int
    lanes: int
    global_batch: int
    steps: int
    steps_in_all: int | None
    packs: int
    rows: tuple[int, int]
    tokens: tuple[int, int]
    fetched_bytes: tuple[int, int]
    blocks: int
    reads_per_byte: float

    @property
    def requests_per_step(self) -> float:
        """Of all ranks: a HEAD and a GET for each block."""
        return 2 * self.blocks / self.steps

    @property
    def fastest_step_seconds(self) -> float:
        """The step time below which the ranks together would ask more often than the bucket allows."""
        return self.requests_per_step / GETS_PER_SECOND


def simulate(plan: PackPlan, *, ranks: int, global_batch: int, steps: int) -> Simulation:
    """Deals out the first ``steps`` steps.

    Raises:
        StreamError: the numbers do not divide, or a pack would come twice in an epoch or to two ranks.
    """
    plan.check_divides(ranks, global_batch)
    in_all = plan.steps(global_batch)
    steps = steps if in_all is None else min(steps, in_all)
    rows, tokens = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    fetched, fetches, packs = np.zeros(ranks, np.int64), 0, 0
    seen: set[tuple[int, int, int, int]] = set()
    touched: set[tuple[int, int]] = set()
    standing = [dict[tuple[int, int], int]() for _ in range(ranks)]
    for step in range(steps):
        for rank in range(ranks):
            for position in plan.share(step, rank=rank, world_size=ranks, global_batch=global_batch):
                address = plan.address(position)
                if address is None:
                    continue
                pack = (address.part, address.epoch, address.group, address.pack)
                if pack in seen:
                    raise StreamError(
                        f"pack {pack} (part, epoch, group, pack) would come twice, at {position}"
                    )
                seen.add(pack)
                line, here = plan.lines[address.part], standing[rank]
                of_pack = plan.rows(address)
                packs, rows[rank] = packs + 1, rows[rank] + len(of_pack)
                tokens[rank] += int(line.index.lengths[of_pack].sum())
                lane = (address.part, position % plan.lanes)
                held = {(part, group) for (part, _), group in here.items()}
                if (address.part, address.group) not in held:
                    blocks = line.groups[address.group]
                    fetched[rank] += int(line.index.block_bytes[blocks].sum())
                    fetches += len(blocks)
                    touched.add((address.part, address.group))
                here[lane] = address.group
    stored = sum(
        int(plan.lines[part].index.block_bytes[plan.lines[part].groups[group]].sum())
        for part, group in touched
    )
    return Simulation(
        ranks=ranks,
        lanes=plan.lanes,
        global_batch=global_batch,
        steps=steps,
        steps_in_all=in_all,
        packs=packs,
        rows=(int(rows.min()), int(rows.max())),
        tokens=(int(tokens.min()), int(tokens.max())),
        fetched_bytes=(int(fetched.min()), int(fetched.max())),
        blocks=fetches,
        reads_per_byte=float(fetched.sum()) / stored if stored else math.nan,
    )
