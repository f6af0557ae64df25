"""Under which key does a data set lie? The one place that knows the bucket's folders."""

from __future__ import annotations

from training_ready.storage.errors import ObjectNotFound, StorageError
from training_ready.storage.objects import ObjectStore, check_key
from training_ready.storage.settings import StorageSettings
from training_ready.storage.uri import S3Uri, parse_s3_uri

PROCESSED = "gdrive/processed"
RAW = "gdrive/raw"
ACQUIRED = "acquired"


def rooted(settings: StorageSettings, key: str) -> str:
    """The full key of a key of the layout: below the root prefix, if the deployment has one."""
    return settings.root_prefix + check_key(key)


def locate(settings: StorageSettings, path: str, *, bucket: str | None = None) -> S3Uri:
    """Where ``path`` lies: an ``s3://`` address as it stands, a bare key below the root prefix of the bucket.

    Raises:
        StorageError: an address without a key, of another kind, or of another bucket than the one asked for.
    """
    uri = parse_s3_uri(path)
    if uri is None:
        return S3Uri(bucket or settings.bucket, rooted(settings, path))
    if bucket is not None and uri.bucket != bucket:
        raise StorageError(
            f"{path} lies in another bucket than the one asked for, '{bucket}': give one of the two."
        )
    return S3Uri(uri.bucket, check_key(uri.key))


def dataset_keys(
    dataset_name: str, category: str | None = None, *, prefer_processed: bool = True
) -> tuple[str, ...]:
    """The layout keys to try for a data set's name, best first.

    The canonical input of the category, then the mirror of the staging area, then the directly acquired sets.
    Without a category there is no canonical input to look for. With ``prefer_processed=False`` it comes last:
    the untouched originals win.
    """
    originals = (f"{RAW}/{dataset_name}", f"{ACQUIRED}/{dataset_name}")
    processed = (f"{PROCESSED}/{category}/{dataset_name}",) if category else ()
    return processed + originals if prefer_processed else originals + processed


def resolve_dataset(
    settings: StorageSettings,
    dataset_name: str,
    category: str | None = None,
    *,
    bucket: str | None = None,
    prefer_processed: bool = True,
) -> S3Uri:
    """The existing object that a name means.

    Args:
        dataset_name: an ``s3://`` address or, without a category, a key with a slash: those mean one object
        and
            nothing else is tried. Any other text is a name, looked for in the order of :func:`dataset_keys`.

    Raises:
        ObjectNotFound: none of the keys exists; the message names every key tried.
        StorageError: the bucket cannot be asked.
    """
    if parse_s3_uri(dataset_name) is not None or ("/" in dataset_name and category is None):
        candidates = [locate(settings, dataset_name, bucket=bucket)]
    else:
        keys = dataset_keys(dataset_name, category, prefer_processed=prefer_processed)
        candidates = [locate(settings, key, bucket=bucket) for key in keys]
    for uri in candidates:
        if ObjectStore(settings, uri.bucket).exists(uri.key):
            return uri
    tried = "".join(f"\n  {uri}" for uri in candidates)
    more = f" A category would add {PROCESSED}/<category>/{dataset_name}."
    hint = "" if category or len(candidates) == 1 else more
    raise ObjectNotFound(
        f"The data set '{dataset_name}' does not exist. Tried, in this order:{tried}\n"
        f"Correct the name, or upload it: training-ready data upload FILE --to {RAW}/.{hint}"
    )


def get_s3_dataset_path(
    dataset_name: str,
    category: str | None = None,
    bucket: str | None = None,
    prefer_processed: bool = True,
    *,
    settings: StorageSettings | None = None,
) -> str:
    """The ``s3://`` address of an existing data set; see :func:`resolve_dataset` for the order and the errors.

    The store is the environment's, unless ``settings`` are given.
    """
    chosen = settings or StorageSettings.from_environment()
    return str(
        resolve_dataset(chosen, dataset_name, category, bucket=bucket, prefer_processed=prefer_processed)
    )
