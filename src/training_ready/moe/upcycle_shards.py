"""How do tensors go from a checkpoint to another one without a whole model in memory?

Read one tensor at a time; written shard by shard, the index last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training_ready.moe.families import MoEError
from training_ready.moe.whole_files import flush_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GIGABYTE = 10**9
_ALIGNMENT = 8


class ShardedTensors:
    """The tensors of a checkpoint folder by name.

    Each is a view of its mapped shard, which is opened anew for every tensor: the pages of a mapping that were
    read count as memory until it is closed, and opening costs less than a millisecond. So a tensor should be
    let go before the next is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of = _file_of_each_tensor(folder)

    @property
    def names(self) -> list[str]:
        """In the order of the shards, so that the disk is read from beginning to end."""
        return sorted(self.file_of, key=lambda name: (self.file_of[name], name))

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self.file_of.values()))]

    def get(self, name: str) -> Tensor:
        """Raises :class:`MoEError` when there is no such tensor or its shard is damaged."""
        try:
            with safe_open(self.folder / self.file_of[name], framework="pt", device="cpu") as shard:
                tensor: Tensor = shard.get_tensor(name)
        except (KeyError, OSError, SafetensorError) as error:
            raise MoEError(f"{self.folder}: tensor {name} cannot be read ({error}).") from error
        return tensor


def _file_of_each_tensor(folder: Path) -> dict[str, str]:
    try:
        if (folder / INDEX).is_file():
            listed: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
            outside = sorted({file for file in listed.values() if Path(file).name != file})
            if outside:
                raise MoEError(f"{folder / INDEX}: {outside[0]!r} is not a file name.")
            return listed
        with safe_open(folder / SINGLE, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise MoEError(
            f"{folder}: neither {INDEX} nor {SINGLE} can be read ({error}); only safetensors are."
        ) from error


class OutgoingTensor(NamedTuple):
    """A tensor that is made where it leaves from, in the output shard itself."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    put: Callable[[Tensor], object]
    """Writes the values into a tensor of that shape and dtype."""


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would exceed ``shard_bytes``.

    They are made in one buffer of that size, used for every shard: allocated one by one, tensors of a few MB
    fragment the heap until it is twice as large. A context manager: leaving it without an error writes the
    index, last.
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._buffer = torch.empty(shard_bytes, dtype=torch.uint8)
        self._pending: dict[str, Tensor] = {}
        self._filled = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    @torch.no_grad()
    def add(self, tensor: OutgoingTensor) -> None:
        size = tensor.shape.numel() * tensor.dtype.itemsize
        start = -(-self._filled // _ALIGNMENT) * _ALIGNMENT
        if self._pending and start + size > self.shard_bytes:
            self._flush()
            start = 0
        if size <= self.shard_bytes:
            place = self._buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
        else:
            place = torch.empty(tensor.shape, dtype=tensor.dtype)  # a shard of its own
        tensor.put(place)
        self._pending[tensor.name] = place
        self._filled = start + size
        self.total_bytes += size

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        path = self.folder / f"{len(self._shards):05d}.unnumbered"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes 0600: https://github.com/huggingface/safetensors/issues/782
        flush_file(path)
        self._pending, self._filled = {}, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"{number:05d}.unnumbered").rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_checkpoint(tensors: Iterable[OutgoingTensor], folder: Path, *, shard_bytes: int) -> int:
    """Write a stream of tensors as a checkpoint; returns the bytes of its weights."""
    with ShardWriter(folder, shard_bytes=shard_bytes) as writer:
        for tensor in tensors:
            writer.add(tensor)
            del tensor  # with the view that it holds
    return writer.total_bytes
