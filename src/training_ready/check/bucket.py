"""Does the bucket let this run read its corpus, and keep its tokens and its checkpoints where they belong?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from training_ready.check.context import CheckContext, Missing
from training_ready.check.corpora import Corpus, trained_splits
from training_ready.check.finding import Finding, counted, failed, passed
from training_ready.storage.errors import StorageError
from training_ready.storage.objects import ObjectStore
from training_ready.storage.verify import verify_store


def probe_bucket(context: CheckContext) -> list[Finding]:
    """Credentials, listing, a read of every shard; write, read and delete where tokens and checkpoints will lie."""
    findings: list[Finding] = []
    _ = context.settings  # offline, and missing credentials, are said once for all of this probe
    if context.recipe.checkpoint.mirror is not False:
        findings += _mirror(context)
    try:
        corpora = context.corpora
    except Missing as missing:
        return [*findings, failed(missing.reason, key=missing.key)]
    for name, corpus in corpora.items():
        faults = [*_shards(context, name, corpus), *_permissions(context, corpus)]
        shards = corpus.manifest.shards
        size = sum(shard.bytes for shard in shards)
        findings += faults or [
            passed(
                f"{corpus.manifest.uri}: {counted(len(shards), 'shard')}, {size:,} bytes, each readable; "
                f"write, read, range and delete proven below {corpus.store.uri(corpus.tokens_prefix)}/tokens",
                shards=len(shards),
                bytes=size,
            )
        ]
    return findings


def _permissions(context: CheckContext, corpus: Corpus) -> Iterator[Finding]:
    prefix = f"{corpus.tokens_prefix}/tokens"
    for fault in _refused(context, corpus.store, prefix):
        yield replace(fault, where=corpus.store.uri(prefix))


def _mirror(context: CheckContext) -> list[Finding]:
    """The bucket of ``checkpoint.mirror`` is another one, often with other rights, and is first used hours later."""
    from training_ready.training.resume import bucket_of

    place = bucket_of(context.recipe)
    if place is None:
        return []
    faults = [replace(one, key="checkpoint.mirror") for one in _refused(context, place.store, place.prefix)]
    return faults or [passed(f"{place.uri}: list, write, read, range and delete proven for the checkpoints")]


def _refused(context: CheckContext, store: ObjectStore, prefix: str) -> Iterator[Finding]:
    """What may not be done below a prefix, found by doing it."""
    settings = context.settings
    proof = verify_store(replace(settings, bucket=store.bucket, root_prefix=""), prefix=prefix)
    for step in proof.steps:
        if step.outcome == "failed":
            yield failed(
                f"no permission or no way to {step.name}: {step.detail}",
                fix=f"give the credentials ({settings.credential_names}) that right in {store.bucket}",
                step=step.name,
            )


def _shards(context: CheckContext, name: str, corpus: Corpus) -> Iterator[Finding]:
    """A shard that is gone, that has another size, or whose bytes may not be read."""
    store = corpus.store
    key = "data.corpus" if name == context.recipe.data.corpus else "stream.mixture"
    splits = {split for corpus_name, split in trained_splits(context.recipe) if corpus_name == name}
    if key == "data.corpus":
        splits.add(str(context.recipe.data.eval_split))
    for shard in corpus.manifest.shards:
        if shard.split not in splits:
            continue
        uri = store.uri(shard.key)
        try:
            size = store.head(shard.key).size
            with store.open(shard.key, ahead=False) as reader:
                reader.read(4)
        except StorageError as error:
            yield failed(f"{uri} cannot be read: {error}", key=key)
            continue
        if size != shard.bytes:
            yield failed(
                f"{uri} has {size:,} bytes, its manifest says {shard.bytes:,}: it was changed after the build",
                key=key,
                fix="build the corpus again",
            )
