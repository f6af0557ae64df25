"""How many steps would the run take? From packs that were counted, or from the packs of the sample."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from training_ready.check.context import CheckContext
from training_ready.check.corpora import mixture_parts, origin_of
from training_ready.recipe.sections import MixturePart
from training_ready.stream.blocks import BLOCK_ROWS
from training_ready.stream.index import Cell, TokenIndex
from training_ready.stream.lengths import LengthPolicy, TokenCounts
from training_ready.stream.line import PackLine
from training_ready.stream.shards import StreamError
from training_ready.stream.token_set import TokenSet
from training_ready.stream.tokens import TokenCache
from training_ready.training.data import begins_early, data_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """``exact`` is False where a sample was scaled up; ``evaluation_packs`` is None without an evaluation split."""

    steps: int
    epochs: float
    packs_per_epoch: int
    packs_per_step: int
    tokens_per_epoch: int
    evaluation_packs: int | None
    exact: bool

    @property
    def about(self) -> str:
        return "" if self.exact else "about "

    @property
    def tokens(self) -> int:
        """Tokens that all steps together see."""
        return round(self.tokens_per_epoch * self.steps * self.packs_per_step / self.packs_per_epoch)


def run_length(context: CheckContext) -> RunLength:
    """See :attr:`CheckContext.length`. An epoch of a mixture is one pass over every part."""
    recipe = context.recipe
    parts = [_part(context, part) for part in mixture_parts(recipe).values()]
    packs, tokens, exact = (sum(column) for column in zip(*parts, strict=True))
    per_step = (
        context.topology.processes
        * recipe.effective("per_device_train_batch_size")
        * recipe.effective("gradient_accumulation_steps")
    )
    asked, epochs = recipe.effective("max_steps"), float(recipe.effective("num_train_epochs"))
    steps = asked if asked > 0 else max(-(-round(epochs * packs) // per_step), 1)
    return RunLength(
        steps=steps,
        epochs=steps * per_step / packs,
        packs_per_epoch=packs,
        packs_per_step=per_step,
        tokens_per_epoch=tokens,
        evaluation_packs=_evaluation_packs(context, packs),
        exact=exact == len(parts),
    )


def _evaluation_packs(context: CheckContext, packs: int) -> int | None:
    """Packs of the evaluation split, if its conversations are as long as those that are trained on."""
    split = context.recipe.data.eval_split
    if split is None:
        return None
    held_out = sum(shard.records for shard in context.corpus.shards(split))
    return max(round(held_out * packs / sum(context.sample.totals.values())), 1)


def _part(context: CheckContext, part: MixturePart) -> tuple[int, int, bool]:
    """(packs, tokens, exact?) of one pass over a part."""
    recipe, origin = context.recipe, origin_of(part, context.recipe)
    index, scale = _counted(context, origin[0], origin[1]), 1.0
    if index is None:
        index, scale = _index_of_sample(context, origin), context.sample.scale(origin)
    store, seed = context.corpora[origin[0]].store, data_seed(recipe)
    token_set = (
        TokenSet.early(name=origin[0], store=store, prefix="", index=index, seed=seed)
        if begins_early(recipe)
        else TokenSet(name=origin[0], store=store, prefix="", index=index)
    )
    line = PackLine(
        token_set,
        max_length=recipe.effective("max_length"),
        seed=seed,
        sources=part.sources,
        stages=part.stages,
        components=part.components,
        packing=recipe.effective("packing"),
        blocks_per_group=recipe.stream.blocks_per_group,
    )
    packs, tokens = line.packs_per_epoch, int(line.epoch_counts[:, 1].sum())
    return max(round(packs * scale), 1), round(tokens * scale), scale == 1.0


def _counted(context: CheckContext, name: str, split: str) -> TokenIndex | None:
    """From the tokens in the bucket, when an earlier run has left those of every shard there."""
    corpus, recipe = context.corpora[name], context.recipe
    cache = TokenCache(
        store=corpus.store,
        corpus_prefix=corpus.tokens_prefix,
        renderer=context.renderer,
        policy=LengthPolicy(max_length=recipe.effective("max_length"), overlong=recipe.stream.overlong),
    )
    return cache.find(corpus.shards(split))


def _index_of_sample(context: CheckContext, origin: tuple[str, str]) -> TokenIndex:
    """The sampled rows of a split as training would index them, cut by its length policy."""
    recipe, tokens, counts = context.recipe, context.tokens, TokenCounts()
    overlong = "drop" if recipe.stream.overlong == "error" else recipe.stream.overlong
    policy = LengthPolicy(max_length=recipe.effective("max_length"), overlong=overlong)
    lengths, learned, cells, of_row = [], [], dict[Cell, int](), []
    for row, record in zip(tokens.rows, tokens.records, strict=True):
        if record["origin"] != origin:
            continue
        components = json.loads(record["metadata"]).get("components", ())
        cell = Cell(record["source_family"], record["stage"], tuple(sorted(components)))
        for kept in policy.apply(row, record["messages"], context.renderer, counts):
            lengths.append(len(kept.input_ids))
            learned.append(int(kept.learned.sum()))
            of_row.append(cells.setdefault(cell, len(cells)))
    if not lengths:
        raise StreamError(f"no sampled record of {origin[1]} is left after the length policy")
    blocks = [min(BLOCK_ROWS, len(lengths) - start) for start in range(0, len(lengths), BLOCK_ROWS)]
    return TokenIndex(
        blocks=tuple(f"sample-{number}" for number in range(len(blocks))),
        block_rows=np.asarray(blocks, dtype=np.int64),
        block_bytes=np.zeros(len(blocks), dtype=np.int64),
        lengths=np.asarray(lengths, dtype=np.int32),
        learned=np.asarray(learned, dtype=np.int32),
        cell_of_row=np.asarray(of_row, dtype=np.int16),
        cells=tuple(cells),
        counts=counts,
    )
