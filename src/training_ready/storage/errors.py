"""What went wrong at the bucket, in words that say what to do next."""

from __future__ import annotations

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from training_ready import TrainingReadyError


class StorageError(TrainingReadyError):
    """The store could not do what was asked."""


class SettingsError(StorageError):
    """The environment does not say enough, or contradicts itself, about the store."""


class ObjectNotFound(StorageError):
    """No such object."""


class ObjectChanged(StorageError):
    """An object is no longer the one that was opened."""


class UploadForgotten(StorageError):
    """The server no longer knows an upload in parts, or one of its parts: only a new upload helps."""


# The permission that each operation needs, as bucket policies spell it.
PERMISSIONS = {
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "CreateBucket": "s3:CreateBucket",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_NOT_OURS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"}
# rclone says InvalidPart of every upload of which one part's connection broke while it was already being joined.
_FORGOTTEN = {"NoSuchUpload", "InvalidPart"}
_BUSY = {
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "InternalError",
    "ServiceUnavailable",
}


def code_of(error: ClientError) -> str:
    """The server's own error code; an answer without a body (to a HEAD) has only its HTTP status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_expired(error: Exception) -> bool:
    return isinstance(error, ClientError) and code_of(error) in _EXPIRED


def is_wordless_refusal(error: ClientError) -> bool:
    """A HEAD is refused without a body, so that an expired token cannot be told from a wrong one."""
    return error.operation_name.startswith("Head") and status_of(error) in (400, 401, 403)


def is_missing(error: Exception) -> bool:
    return isinstance(error, ClientError) and status_of(error) == 404


def is_rejected(error: ClientError) -> bool:
    """Whether the server does not know the credentials, rather than forbids them something."""
    return code_of(error) in _NOT_OURS | _EXPIRED


def is_passing(error: BaseException | None) -> bool:
    """Whether asking again may help: lost connections, cut bodies, timeouts, a busy server."""
    if isinstance(error, ClientError):
        return status_of(error) in (408, 429) or status_of(error) >= 500 or code_of(error) in _BUSY
    return isinstance(error, HTTPClientError | IncompleteReadError | OSError)


def translate(error: Exception, *, operation: str, uri: str, endpoint: str, keys_from: str) -> StorageError:
    """Turn botocore's error into ours: what, where, why, next step.

    ``keys_from`` names the variables that the credentials came from; their values are never shown.
    """
    what = f"{operation} of {uri} at {endpoint} failed"
    if isinstance(error, ClientError):
        return _answered(error, what=what, operation=operation, uri=uri, keys_from=keys_from)
    if isinstance(error, BotoCoreError | OSError):
        return StorageError(
            f"{what}: no usable answer ({type(error).__name__}: {error}). "
            "Check OVH_S3_ENDPOINT and that this machine can reach it: training-ready data verify"
        )
    return StorageError(f"{what}: {type(error).__name__}: {error}")


def _answered(error: ClientError, *, what: str, operation: str, uri: str, keys_from: str) -> StorageError:
    code, status = code_of(error), status_of(error)
    if code in _EXPIRED:
        return StorageError(f"{what}: the session token has expired. Renew the credentials in {keys_from}.")
    if code in _NOT_OURS:
        return StorageError(
            f"{what}: the server rejects the credentials ({code}). They come from {keys_from}: "
            "check that both belong together, to this endpoint and to this region."
        )
    if is_wordless_refusal(error) and status != 403:
        return StorageError(
            f"{what}: HTTP {status}, and the answer to a HEAD has no word of why. Most often the credentials from "
            f"{keys_from} have expired or belong to another region: training-ready data verify"
        )
    if status == 403:
        permission = PERMISSIONS.get(operation, f"s3:{operation}")
        hint = (
            " (without s3:ListBucket a missing key is also answered with 403)"
            if "Object" in operation
            else ""
        )
        return StorageError(
            f"{what}: 403, access denied. The credentials from {keys_from} need {permission} there{hint}."
        )
    if code == "NoSuchBucket" or (status == 404 and operation in ("HeadBucket", "ListObjectsV2")):
        return no_bucket(uri)
    if code in _FORGOTTEN:
        return UploadForgotten(
            f"{what}: the server no longer knows this upload or one of its parts ({code}). Upload the file again."
        )
    if status == 404:
        return ObjectNotFound(f"{what}: there is no such object. List what is there, or correct the key.")
    message = str(error.response.get("Error", {}).get("Message", ""))
    return StorageError(f"{what}: HTTP {status} {code} {message}".rstrip())


def no_bucket(uri: str) -> StorageError:
    bucket = uri.removeprefix("s3://").split("/", 1)[0]
    return StorageError(
        f"The bucket '{bucket}' does not exist (looking for {uri}). "
        "Set OVH_S3_BUCKET to an existing one, or create it."
    )
