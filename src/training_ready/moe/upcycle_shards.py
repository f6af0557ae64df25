"""How do tensors go from a checkpoint to another one without a whole model in memory?

Read one tensor at a time, with one shard open; written shard by shard, the index last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training_ready.moe.families import MoEError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GIGABYTE = 10**9


class ShardedTensors:
    """The tensors of a checkpoint folder by name. A context manager: at most one shard is mapped at a time.

    What :meth:`get` returns is a view of the mapped file: copy it before the next shard is opened, or the
    mapping stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_file: str | None = None
        self._handle: Any = None
        self.file_of = _file_of_each_tensor(folder)

    @property
    def names(self) -> list[str]:
        """In the order of the shards, so that reading through opens each of them once."""
        return sorted(self.file_of, key=lambda name: (self.file_of[name], name))

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self.file_of.values()))]

    def get(self, name: str) -> Tensor:
        """Raises :class:`MoEError` when there is no such tensor or its shard is damaged."""
        try:
            file = self.file_of[name]
            if file != self._open_file:
                self.close()
                self._handle = safe_open(self.folder / file, framework="pt", device="cpu")
                self._open_file = file
            tensor: Tensor = self._handle.get_tensor(name)
        except (KeyError, OSError, SafetensorError) as error:
            raise MoEError(f"{self.folder}: tensor {name} cannot be read ({error}).") from error
        return tensor

    def close(self) -> None:
        self._handle, self._open_file = None, None

    def __enter__(self) -> ShardedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would exceed ``shard_bytes``.

    A context manager: leaving it without an error writes the index, last. Tensors must not be changed after
    :meth:`add`.
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        path = self.folder / f"{len(self._shards):05d}.unnumbered"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes 0600: https://github.com/huggingface/safetensors/issues/782
        flush_file(path)
        self._pending, self._pending_bytes = {}, 0

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
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"{number:05d}.unnumbered").rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_checkpoint(tensors: Iterable[tuple[str, Tensor]], folder: Path, *, shard_bytes: int) -> int:
    """Write a stream of tensors as a checkpoint; returns the bytes of its weights."""
    with ShardWriter(folder, shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
            del tensor  # or the last one of a shard would be held while the next is made
    return writer.total_bytes


def flush_file(path: Path) -> None:
    """Until it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
