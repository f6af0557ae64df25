"""Targets: can this engine serve the model that was trained, and is what it serves the same model?

A release holds what transformers 5 writes. Each target rewrites those files for one kind of engine, shard by shard and
without a GPU (:mod:`.export`), or refuses with a reason and the nearest target that can (:mod:`.table`); :mod:`.verify`
then loads the result as the engine would and measures the difference.
"""
