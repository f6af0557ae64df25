"""From a finished run to a release folder: load the checkpoint, export it, write its card."""

from __future__ import annotations

from pathlib import Path

from training_ready.release.card import ReleaseWords, make_record, require_words, write_card
from training_ready.release.contents import ReleaseFile, release_files
from training_ready.release.export import end_of_turn_ids, load_checkpoint, read_tokenizer, write_release
from training_ready.release.facts import CardError, RunFacts, load_facts
from training_ready.release.record import ReleaseRecord
from training_ready.release.shared_base import is_shared_base, write_shared_base_release


def build_release(
    run_folder: Path, folder: Path, words: ReleaseWords, *, title: str | None = None
) -> list[ReleaseFile]:
    """Write the release of `run_folder` into `folder` and return its files, checked as they will be published.

    `words` is the recipe's `release:` section; `title` defaults to the run's name. Everything that can be refused
    without loading weights is refused first.

    Raises CardError, ExportError or ContentsError.
    """
    require_words(words)
    facts = load_facts(run_folder)
    checkpoint = find_checkpoint(facts, run_folder)
    if is_shared_base(checkpoint):
        write_shared_base_release(checkpoint, folder, target_role=facts.data.target_role)
    else:
        model, tokenizer = load_checkpoint(checkpoint, base_revision=facts.model.base_revision)
        ends = end_of_turn_ids(tokenizer, facts.data.target_role)
        write_release(model, tokenizer, folder, end_of_turn_ids=ends)
    write_card(facts, words, run_folder, folder, title=title or facts.run)
    return release_files(folder)


def adapter_record(checkpoint: Path, words: ReleaseWords) -> ReleaseRecord:
    """What the card of the adapter in `checkpoint` is written from: the facts of the run whose folder it lies in.

    Raises CardError when the run did not finish, ended with another checkpoint, or its words are missing; ExportError
    when the tokenizer beside the adapter is not what the run trained with.
    """
    require_words(words)
    facts = load_facts(checkpoint.parent)
    described = find_checkpoint(facts, checkpoint.parent)
    if described.resolve() != checkpoint.resolve():
        raise CardError(
            f"the facts of {checkpoint.parent} are about {described.name}, not about {checkpoint.name}"
        )
    if facts.model.base_model is None:
        raise CardError(f"model.base_model: {checkpoint} holds an adapter, and the run names no base model")
    if not (checkpoint / "tokenizer.json").is_file():
        raise CardError(f"{checkpoint} holds no tokenizer.json, and the card quotes the chat template")
    ends = end_of_turn_ids(read_tokenizer(checkpoint), facts.data.target_role)
    return make_record(facts, words, checkpoint, title=facts.run, ends=ends)


def find_checkpoint(facts: RunFacts, run_folder: Path) -> Path:
    """The checkpoint that the summary names, also when the run folder has been moved since."""
    for candidate in (Path(facts.checkpoint), run_folder / Path(facts.checkpoint).name):
        if candidate.is_dir():
            return candidate
    raise CardError(f"checkpoint: {facts.checkpoint} does not exist, nor does its namesake in {run_folder}")
