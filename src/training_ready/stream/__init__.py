"""Which tokens come next? Corpus shards → rows → chat template → tokens → packs, in an order that resumes exactly.

``training_ready.stream.load`` gives the packs of corpora and raw objects as a ``datasets.IterableDataset``, without
any trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training_ready.stream.loading import CorpusPart, RawPart, load

__all__ = ["CorpusPart", "RawPart", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from training_ready.stream import loading  # imports datasets, which takes seconds

    return getattr(loading, name)
