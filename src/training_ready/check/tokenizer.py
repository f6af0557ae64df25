"""Which tokenizer would training use? For a model from scratch it may not exist yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from training_ready.check.context import CheckContext
from training_ready.check.meta_model import model_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(context: CheckContext) -> PreTrainedTokenizerBase:
    """The tokenizer of the run. See :attr:`CheckContext.tokenizer`.

    For a model from scratch: the run folder's if the run has started before, else one learned from the sampled
    records (the very one that training will learn where the sample is the whole split), offline one that knows single
    bytes only. Its template and special tokens are those of training in each case.
    """
    from training_ready.training.tokenizer import load_tokenizer, train_tokenizer

    recipe = context.recipe
    wanted = recipe.model.tokenizer
    if wanted is None:
        return load_tokenizer(
            model_source(context),
            revision=recipe.effective("model_revision"),
            chat_template_path=recipe.trl.get("chat_template_path"),
            pad_token=recipe.trl.get("pad_token"),
        )
    if (recipe.output_dir / "tokenizer").is_dir():
        return load_tokenizer(str(recipe.output_dir / "tokenizer"))
    return train_tokenizer(_texts(context), vocab_size=wanted.vocab_size, chat_template=wanted.chat_template)


def _texts(context: CheckContext) -> Iterator[str]:
    if not context.offline:
        for record in context.sample.records:
            yield from (message["content"] for message in record["messages"])
