"""Is this the dense base that the experts were trained over? Known by the bytes of its weights, wherever it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training_ready.moe.families import MoEError
from training_ready.moe.upcycle_target import expected_names


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseIdentity:
    """A dense model: where it came from, and what it was when experts were trained over it."""

    name: str
    """Path or repository."""
    revision: str | None
    """Commit of the repository; None for a folder."""
    dtype: str
    """Of its weights in training, as ``bfloat16``."""
    sha256: str
    """See :func:`fingerprint`."""


def fingerprint(names: Sequence[str], get: Callable[[str], Tensor], *, dtype: torch.dtype) -> str:
    """sha256 over name, shape and bytes of every tensor in the order of ``names``, cast to ``dtype``."""
    digest = hashlib.sha256()
    for name in names:
        tensor = get(name).detach().to("cpu", dtype).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {dtype}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identify(dense: Any) -> BaseIdentity:
    """The identity of a dense model that lies whole in this process.

    Raises :class:`MoEError` for weights of several types.
    """
    names = expected_names(dense.config)
    types = {dense.get_parameter(name).dtype for name in names}
    if len(types) > 1:
        listed = ", ".join(sorted(map(str, types)))
        raise MoEError(f"the dense base holds weights of several types ({listed}); set dtype in the recipe.")
    dtype = types.pop()
    return BaseIdentity(
        name=str(dense.config._name_or_path),
        revision=getattr(dense.config, "_commit_hash", None),
        dtype=str(dtype).removeprefix("torch."),
        sha256=fingerprint(names, dense.get_parameter, dtype=dtype),
    )
