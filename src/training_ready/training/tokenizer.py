"""Which tokenizer? The model's own, or a small byte-level BPE learned from the corpus for a model from a config."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training_ready import TrainingReadyError

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_POLL_SECONDS = 0.5


class TokenizerError(TrainingReadyError):
    """No usable tokenizer."""


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, chat_template: str = "chatml"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; it can encode any text, whatever it was trained on.

    Args:
        chat_template: ``chatml``, or a ``.jinja`` file.

    ``<|im_end|>`` ends a turn and is the EOS token; padding has a token of its own, so that EOS is never masked.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN],
        clean_up_tokenization_spaces=False,
    )
    built_in = resources.files(__package__) / "chatml.jinja"
    template = built_in if chat_template == "chatml" else Path(chat_template)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def trained_once(
    folder: Path,
    texts: Iterable[str],
    *,
    vocab_size: int,
    chat_template: str,
    checkpoint: Path | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer kept in ``folder``; if need be it is put there first by this node's first process.

    It is the one of the ``checkpoint`` that the run continues from, else it is trained. The other processes of the
    node wait for the folder, which appears complete or not at all.
    """
    if not folder.exists():
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            building = folder.with_name(f".{folder.name}.building")
            shutil.rmtree(building, ignore_errors=True)
            tokenizer = (
                train_tokenizer(texts, vocab_size=vocab_size, chat_template=chat_template)
                if checkpoint is None
                else load_tokenizer(str(checkpoint))
            )
            tokenizer.save_pretrained(building)
            os.replace(building, folder)
        else:
            _wait_for(folder)
    return load_tokenizer(str(folder))


def load_tokenizer(
    name_or_path: str,
    *,
    revision: str | None = None,
    chat_template_path: str | None = None,
    pad_token: str | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or hub, with its chat template replaced when a ``.jinja`` file is given.

    Raises:
        TokenizerError: it cannot be loaded, or has no padding token apart from the one that ends a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"no tokenizer in {name_or_path!r} (revision {revision or 'main'}): {error}. Check model_name_or_path, "
            "HF_ENDPOINT and HF_TOKEN."
        ) from error
    # transformers 5.23 makes an empty one for some models
    if len(tokenizer) == len(tokenizer.all_special_ids):
        raise TokenizerError(
            f"{name_or_path!r} holds no tokenizer; save the model's own beside its config.json"
        )
    if chat_template_path:
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    if pad_token:
        if pad_token not in tokenizer.get_vocab():
            raise TokenizerError(f"pad_token {pad_token!r} is not in the vocabulary of {name_or_path!r}")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise TokenizerError(
            f"{name_or_path!r} has no padding token of its own (pad {tokenizer.pad_token!r}, EOS "
            f"{tokenizer.eos_token!r}): "
            "padding with the token that ends a turn hides from the model when to stop. Name an unused special token "
            "with `pad_token:` in the recipe."
        )
    return tokenizer


def _wait_for(folder: Path, patience_seconds: float = 1800) -> None:
    deadline = time.monotonic() + patience_seconds
    while not folder.exists():
        if time.monotonic() > deadline:
            raise TokenizerError(
                f"{folder} did not appear in {patience_seconds:.0f} s: the process with LOCAL_RANK=0 failed before "
                "it; look at its log"
            )
        time.sleep(_POLL_SECONDS)
