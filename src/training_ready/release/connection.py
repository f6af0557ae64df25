"""How is a hub reached safely? Which token goes where, when Xet must be off, and what a failure means in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from training_ready import TrainingReadyError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PUBLIC_HUB = "https://huggingface.co"
HUB_TOKEN = "TRAINING_READY_HUB_TOKEN"  # noqa: S105  (the variable's name)


class PublishError(TrainingReadyError):
    """The release is not on the hub as it is on disk; the message says what is, and what to do."""


def hub_endpoint(given: str | None = None) -> str:
    """The hub's base URL: `given`, else HF_ENDPOINT, else the public Hub.

    Raises PublishError for one with a name or password in it, which every message and log would repeat.
    """
    endpoint = (given or os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
    parts = urlsplit(endpoint)
    if "@" in parts.netloc:
        raise PublishError(
            f"the hub's address ({parts.scheme}://…@{parts.netloc.rpartition('@')[2]}) holds a name or a password, "
            "which messages would show. Give the address alone (HF_ENDPOINT, --endpoint), and a token in HF_TOKEN."
        )
    return endpoint


def is_public_hub(endpoint: str) -> bool:
    return urlsplit(endpoint).hostname in ("huggingface.co", "hf.co", "hub-ci.huggingface.co")


def token_for(endpoint: str) -> str | None:
    """The environment's token for `endpoint`: HF_TOKEN, else that of a hub of one's own, never for the public Hub."""
    own = None if is_public_hub(endpoint) else os.environ.get(HUB_TOKEN)
    return os.environ.get("HF_TOKEN") or own or None


@contextmanager
def without_xet(endpoint: str) -> Iterator[None]:
    """Upload by Git LFS while inside, unless `endpoint` is the public Hub.

    Where hf_xet is installed, `huggingface_hub` 2.4 sends large files by Xet only and has no way back to LFS;
    self-hosted hubs answer that with 404. `HF_HUB_DISABLE_XET` is read once at import but consulted at each call, so
    it is set here, for the whole process, and restored. Remove when `huggingface_hub` falls back by itself.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or not is_public_hub(endpoint)
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def hub_api(endpoint: str, token: str | None) -> Iterator[HfApi]:
    """A client for `endpoint`, quiet, and without Xet where Xet would fail. None as `token`: see publish_release."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    # The stored login belongs to the public Hub: it is never sent to another endpoint.
    api = HfApi(endpoint=endpoint, token=token or (None if is_public_hub(endpoint) else False))
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()  # the caller's own bar counts the bytes
    try:
        with without_xet(endpoint):
            yield api
    finally:
        if shown:
            enable_progress_bars()


def is_passing(error: Exception) -> bool:
    """Whether asking again may help: a broken connection, or a hub that stumbled."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return bool(error.response.status_code >= 500 or error.response.status_code in (408, 429))
    return isinstance(error, httpx2.TransportError | ConnectionError) and not isinstance(
        error, OfflineModeIsEnabled | httpx2.UnsupportedProtocol
    )


@dataclass(kw_only=True, slots=True)
class Journey:
    """How far a publication has come, for the message that ends it. `again` is the command that continues it."""

    folder: Path
    again: str
    main_may_have_moved: bool = False

    def rest(self) -> str:
        main = (
            "Whether main moved is not known; the same command finds out."
            if self.main_may_have_moved
            else "main did not move."
        )
        return f"{main} The release stays in {self.folder}. To continue, run: {self.again}"


@contextmanager
def clear_errors(journey: Journey, endpoint: str, repo_id: str) -> Iterator[None]:
    """Turn what the client raises into one sentence and the next thing to do."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except PublishError as error:
        raise PublishError(f"{error} To continue, run: {journey.again}") from error
    except OfflineModeIsEnabled as error:
        message = f"HF_HUB_OFFLINE is set, so {endpoint} cannot be reached. Unset it. {journey.rest()}"
        raise PublishError(message) from error
    except (HFValidationError, httpx2.InvalidURL, httpx2.UnsupportedProtocol, ValueError) as error:
        raise PublishError(f"{repo_id} cannot be published to {endpoint}: {error}") from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        message = (
            f"no hub answers at {endpoint} ({error}). Start it, or correct HF_ENDPOINT. {journey.rest()}"
        )
        raise PublishError(message) from error
    except (httpx2.TransportError, ConnectionError) as error:
        raise PublishError(f"the connection to {endpoint} broke ({error!r}). {journey.rest()}") from error
    except HfHubHTTPError as error:
        raise PublishError(f"{_refusal(error, endpoint, repo_id)} {journey.rest()}") from error
    except RuntimeError as error:  # what the client wraps around a failed LFS upload
        why = f"{str(error).rstrip('.')}: {error.__cause__ or 'no reason given'}"
        raise PublishError(f"the upload to {endpoint} failed. {why}. {journey.rest()}") from error


def _refusal(error: Any, endpoint: str, repo_id: str) -> str:
    status = error.response.status_code
    said = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
    if status in (401, 403):
        owner = repo_id.partition("/")[0]
        return (
            f"{endpoint} refuses access to {repo_id} (HTTP {status}: {said}). "
            f"Set HF_TOKEN to a token of that hub with write access to {owner}."
        )
    return f"{endpoint} answered HTTP {status} for {repo_id}: {said}."
