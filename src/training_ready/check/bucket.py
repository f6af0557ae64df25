"""Does the bucket let this run read its corpus, and keep its tokens beside it?"""

from __future__ import annotations

from dataclasses import replace

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, passed
from training_ready.storage.errors import StorageError
from training_ready.storage.verify import verify_store


def probe_bucket(context: CheckContext) -> list[Finding]:
    """Credentials, listing, a read of every shard, and a write, read and delete where the tokens will lie."""
    manifest, store = context.manifest, context.store
    where = manifest.uri
    findings = [*_shards(context)]
    prefix = manifest.uri.removeprefix(store.uri("")).rpartition("/")[0] + "/tokens"
    proof = verify_store(replace(context.settings, bucket=store.bucket, root_prefix=""), prefix=prefix)
    for step in proof.steps:
        if step.outcome == "failed":
            findings.append(
                failed(
                    f"no permission or no way to {step.name} below {store.uri(prefix)}: {step.detail}",
                    where=store.uri(prefix),
                    fix=f"give the credentials ({context.settings.credential_names}) that right in {store.bucket}",
                    step=step.name,
                )
            )
    if findings:
        return findings
    size = sum(shard.bytes for shard in manifest.shards)
    return [
        passed(
            f"{where}: {len(manifest.shards)} shards, {size:,} bytes, each readable; write, read, range and delete "
            f"proven below {store.uri(prefix)}",
            shards=len(manifest.shards),
            bytes=size,
        )
    ]


def _shards(context: CheckContext) -> list[Finding]:
    """A shard that is gone, that has another size, or whose bytes may not be read."""
    store, faults = context.store, []
    splits = {context.recipe.data.train_split, context.recipe.data.eval_split}
    for shard in context.manifest.shards:
        if shard.split not in splits:
            continue
        uri = store.uri(shard.key)
        try:
            size = store.head(shard.key).size
            with store.open(shard.key, ahead=False) as reader:
                reader.read(4)
        except StorageError as error:
            faults.append(failed(f"{uri} cannot be read: {error}", key="data.corpus", where=uri))
            continue
        if size != shard.bytes:
            faults.append(
                failed(
                    f"{uri} has {size:,} bytes, its manifest says {shard.bytes:,}: it was changed after the build",
                    key="data.corpus",
                    fix="build the corpus again",
                )
            )
    return faults
