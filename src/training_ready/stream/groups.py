"""How are the blocks fetched before they are needed? Whole groups, ahead of the packs, in threads.

A group stays in memory while a lane stands in it: with 8 blocks of 1,000 rows of 300 tokens that is 10 MB for every
lane that this rank reads, times the parts of the mixture.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

from training_ready.stream.blocks import BlockReader, TokenBlock
from training_ready.stream.plan import PackAddress, PackPlan
from training_ready.stream.render import RenderedConversation

_AHEAD = 64  # packs looked ahead
_THREADS = 8

# (part, number): the same blocks in every epoch
_Group = tuple[int, int]
_Blocks = dict[int, Future[TokenBlock]]


class _Threads(NamedTuple):
    """Many fetch, one decodes."""

    fetch: ThreadPoolExecutor
    decode: ThreadPoolExecutor

    def read(self, reader: BlockReader, block: int) -> Future[TokenBlock]:
        return self.fetch.submit(
            lambda: self.decode.submit(reader.decode, block, reader.fetch(block)).result()
        )


class PackReader:
    """The packs at given addresses, in order."""

    def __init__(self, plan: PackPlan, readers: Sequence[BlockReader]) -> None:
        """
        Args:
            readers: of the blocks of each part, in the plan's order.
        """
        self.plan, self._readers = plan, readers
        self.waited = 0.0  # seconds that whoever consumes the packs has waited for them

    @property
    def bytes_read(self) -> int:
        """Stored bytes of the blocks that were fetched."""
        return sum({id(reader): reader.bytes_read for reader in self._readers}.values())

    def traffic(self) -> Counter[str]:
        """What reading has cost so far, by the names of :class:`training_ready.storage.traffic.Cost`."""
        stores = {id(reader.store): reader.store for reader in self._readers}.values()
        return sum((Counter(asdict(store.traffic.cost())) for store in stores), Counter())

    def read(self, positions: Iterable[int]) -> Iterator[tuple[int, list[RenderedConversation]]]:
        """(position, rows) of each position; no rows at an empty one. Waits for tokens that are still being made."""
        with (
            ThreadPoolExecutor(_THREADS, thread_name_prefix="stream") as threads,
            # One thread decodes: Arrow's allocator keeps memory for every thread that ever used it.
            ThreadPoolExecutor(1, thread_name_prefix="stream-decode") as decoder,
        ):
            held: dict[_Group, _Blocks] = {}
            needed: Counter[_Group] = Counter()  # packs in sight, and lanes that stand in it
            standing: dict[tuple[int, int], _Group] = {}  # (part, lane)
            try:
                for position, address, let_go in self._in_sight(
                    positions, needed, standing, held, _Threads(threads, decoder)
                ):
                    yield position, self._rows(address, held) if address else []
                    if address:
                        needed[address.part, address.group] -= 1
                    for group in {*let_go, *([(address.part, address.group)] if address else [])}:
                        if not needed[group]:
                            held.pop(group, None)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                decoder.shutdown(wait=False, cancel_futures=True)

    def _in_sight(
        self,
        positions: Iterable[int],
        needed: Counter[_Group],
        standing: dict[tuple[int, int], _Group],
        held: dict[_Group, _Blocks],
        threads: _Threads,
    ) -> Iterator[tuple[int, PackAddress | None, list[_Group]]]:
        """Positions and addresses, each when the next ``_AHEAD`` are being fetched, and groups that lanes have left.

        Looking ahead waits for no tokens: whoever asks for a pack gets it before later ones are tokenised.
        """
        window: deque[tuple[int, PackAddress | None]] = deque()
        coming = iter(positions)
        position = next(coming, None)
        while True:
            left: list[_Group] = []
            while (
                position is not None and len(window) < _AHEAD and (not window or self.plan.is_known(position))
            ):
                address = self.plan.address(position)
                window.append((position, address))
                here, position = position, next(coming, None)
                if address is None:
                    continue
                group, lane = (address.part, address.group), (address.part, here % self.plan.lanes)
                needed[group] += 1
                if standing.get(lane) != group:
                    if lane in standing:
                        needed[standing[lane]] -= 1
                        left.append(standing[lane])
                    standing[lane] = group
                    needed[group] += 1
                if group not in held:
                    held[group] = self._fetch(group, threads)
            if not window:
                return
            yield *window.popleft(), left

    def _fetch(self, group: _Group, threads: _Threads) -> _Blocks:
        part, number = group
        reader = self._readers[part]
        blocks = self.plan.lines[part].groups[number].tolist()
        return {block: threads.read(reader, block) for block in blocks}

    def _rows(self, address: PackAddress, held: dict[_Group, _Blocks]) -> list[RenderedConversation]:
        line, blocks = self.plan.lines[address.part], held[address.part, address.group]
        rows = self.plan.rows(address)
        starts, cells, cell_of_row = line.index.block_starts, line.index.cells, line.index.cell_of_row
        return [
            blocks[block].result().row(int(row - starts[block]), cells[cell_of_row[row]].domain)
            for row, block in zip(rows.tolist(), line.blocks_of(rows).tolist(), strict=True)
        ]
