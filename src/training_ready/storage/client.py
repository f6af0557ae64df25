"""How do we talk to the store? One boto3 client per process and settings, made when first needed."""

from __future__ import annotations

import ipaddress
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from training_ready.storage.budget import budget_of
from training_ready.storage.errors import SettingsError
from training_ready.storage.settings import StorageSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_clients: dict[tuple[int, StorageSettings], S3Client] = {}  # by process and by store, whatever the bucket
_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


def make_client(settings: StorageSettings) -> S3Client:
    """A new client.

    Checksums are sent and checked only where S3 requires them: many S3-compatible servers know no others.
    Hosts that are numbers or ``localhost`` are addressed by path, since ``bucket.127.0.0.1`` names nothing.

    Raises:
        SettingsError: credentials or endpoint are missing, or boto3 refuses the settings.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    access_key, secret_key = settings.require_credentials()
    numeric, loopback = _kind_of_host(settings.endpoint_url)
    options: dict[str, Any] = {"s3": {"addressing_style": "path"}} if numeric or loopback else {}
    if loopback:
        options["proxies"] = {}  # a proxy of the environment cannot reach this machine's own loopback
    config = Config(
        signature_version="s3v4",
        retries={"mode": "standard", "total_max_attempts": 5},
        connect_timeout=10,
        read_timeout=60,
        tcp_keepalive=True,
        max_pool_connections=32,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **options,
    )
    try:
        # A session of its own: boto3's default session may not be shared between threads.
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.signing_region,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            aws_session_token=settings.session_token,
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        raise SettingsError(f"No client for {settings.endpoint_name}: {error}") from error
    budget = budget_of(settings.endpoint_name)

    def wait_for_turn(request: Any, **_: Any) -> None:
        budget.take(request.method)

    # At the last moment before the wire, so that botocore's own retries and the parts of uploads wait too.
    client.meta.events.register("before-send.s3", wait_for_turn)
    return client


def client_for(settings: StorageSettings) -> S3Client:
    """This process' client for these settings' store, whichever bucket; a forked child gets its own."""
    key = (os.getpid(), replace(settings, bucket="any", checkpoint_bucket="any", root_prefix=""))
    with _lock:
        if key not in _clients:
            _clients[key] = make_client(settings)
        return _clients[key]


def _kind_of_host(endpoint_url: str | None) -> tuple[bool, bool]:
    """Whether the host is a number, and whether it is this machine."""
    host = urlsplit(endpoint_url).hostname if endpoint_url else None
    if host is None:
        return False, False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False, host == "localhost" or host.endswith(".localhost")
    return True, address.is_loopback
