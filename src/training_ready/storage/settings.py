"""Which store, and with whose keys? Read from the environment and a ``.env`` file, never at import time."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from training_ready.storage.errors import SettingsError

# For each field the variables that may set it; the first that is set wins.
VARIABLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "access_key_id": ("OVH_S3_ACCESS_KEY", "OVH_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
        "secret_access_key": ("OVH_S3_SECRET_KEY", "OVH_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"),
        "endpoint_url": ("OVH_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "region": ("OVH_S3_REGION", "AWS_REGION"),
        "bucket": ("OVH_S3_BUCKET",),
        "checkpoint_bucket": ("OVH_S3_CHECKPOINT_BUCKET",),
        "root_prefix": ("OVH_S3_ROOT_PREFIX",),
    }
)
_OVH_HOST = re.compile(r"^s3\.([a-z0-9-]+)\.(?:io|perf)\.cloud\.ovh\.(?:net|us)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageSettings:
    """One S3 store. Credentials never appear in ``repr``.

    ``root_prefix`` is empty or ends in a slash; layout keys are relative to it. ``sources`` says which
    variable set which field, so that an error can name it without showing its value.
    """

    bucket: str = "pixelated-training-data"
    checkpoint_bucket: str = "pixelated-checkpoints"
    endpoint_url: str | None = None
    region: str | None = None
    root_prefix: str = ""
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_endpoint(self.endpoint_url)
        for name, bucket in (("bucket", self.bucket), ("checkpoint bucket", self.checkpoint_bucket)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
                raise SettingsError(
                    f"The {name} '{bucket}' is not a bucket's name: give the name alone, no s3:// and no /."
                )
        prefix = self.root_prefix.strip("/")
        object.__setattr__(self, "root_prefix", f"{prefix}/" if prefix else "")

    @classmethod
    def from_environment(
        cls, env: Mapping[str, str] | None = None, *, dotenv: bool = True, **overrides: str | None
    ) -> StorageSettings:
        """Read the settings; an override that is not None wins over every variable.

        With ``dotenv`` the first ``.env`` found in the working directory or a parent adds what the
        environment leaves unset. Empty values count as unset. Credentials may be absent: using the store
        without them is what fails (:meth:`require_credentials`).
        """
        merged = {
            name: value for name, value in (os.environ if env is None else env).items() if value.strip()
        }
        if dotenv:
            merged = {**read_dotenv(), **merged}
        values: dict[str, str] = {}
        sources: dict[str, str] = {}
        for name, variables in VARIABLES.items():
            found = next((variable for variable in variables if variable in merged), None)
            if found is not None:
                values[name], sources[name] = merged[found].strip(), found
        # A session token belongs to AWS' own key; beside an OVH key a leftover one would only break requests.
        if sources.get("access_key_id") == "AWS_ACCESS_KEY_ID" and "AWS_SESSION_TOKEN" in merged:
            values["session_token"], sources["session_token"] = (
                merged["AWS_SESSION_TOKEN"].strip(),
                "AWS_SESSION_TOKEN",
            )
        given = {name: value for name, value in overrides.items() if value is not None}
        sources.update(dict.fromkeys(given, "the caller's argument"))
        return cls(**{**values, **given}, sources=sources)

    def require_credentials(self) -> tuple[str, str]:
        """Return access key and secret, or say which variables were looked at.

        Raises:
            SettingsError: one of them is missing, or OVHcloud's keys come without an endpoint.
        """
        missing = [
            f"no {what} (looked at {', '.join(VARIABLES[name])})"
            for name, what in (("access_key_id", "access key"), ("secret_access_key", "secret key"))
            if not getattr(self, name)
        ]
        if not self.access_key_id or not self.secret_access_key:
            raise SettingsError(
                f"No credentials for the store: {' and '.join(missing)}. Set them in the environment or in "
                "a .env file in this directory or a parent; without an account: training-ready store serve."
            )
        if self.endpoint_url is None and self.sources.get("access_key_id", "").startswith("OVH_"):
            raise SettingsError(
                f"{self.sources['access_key_id']} is set but no endpoint (looked at "
                f"{', '.join(VARIABLES['endpoint_url'])}). Set OVH_S3_ENDPOINT, such as https://s3.<region>.io.cloud.ovh.net."
            )
        return self.access_key_id, self.secret_access_key

    @property
    def signing_region(self) -> str:
        """The region to sign for: the one set, the one in OVHcloud's host name, or S3's own default."""
        host = urlsplit(self.endpoint_url).hostname if self.endpoint_url else None
        named = _OVH_HOST.match(host) if host else None
        return self.region or (named.group(1) if named else "us-east-1")

    @property
    def endpoint_name(self) -> str:
        return self.endpoint_url or f"AWS S3 ({self.signing_region})"

    @property
    def credential_names(self) -> str:
        """The variables that the credentials came from, for messages."""
        names = [self.sources.get(name, "the caller") for name in ("access_key_id", "secret_access_key")]
        return " and ".join(dict.fromkeys(names))

    def reread(self) -> StorageSettings:
        """The same store with the credentials that the environment holds now: a token has expired."""
        now = StorageSettings.from_environment()
        if self.sources.get("access_key_id") != now.sources.get("access_key_id"):
            return self
        keys = ("access_key_id", "secret_access_key", "session_token")
        return replace(self, **{name: getattr(now, name) for name in keys})


def _check_endpoint(url: str | None) -> None:
    if url is None:
        return
    try:
        parts = urlsplit(url)
        usable = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        usable, secret = False, False
    if secret:  # the URL itself is not shown: it holds a secret
        raise SettingsError(
            "The endpoint URL holds a user name or password; give those in their own variables."
        )
    if not usable:
        raise SettingsError(f"The endpoint '{url}' is not a URL such as https://s3.gra.io.cloud.ovh.net.")


def read_dotenv(start: Path | None = None) -> dict[str, str]:
    """The non-empty values of the first ``.env`` in ``start`` (or the working directory) or a parent, if any.

    Raises:
        SettingsError: a line that is neither ``KEY=VALUE``, a comment, nor blank; its text is not repeated.
    """
    here = (start or Path.cwd()).resolve()
    path = next((folder / ".env" for folder in (here, *here.parents) if (folder / ".env").is_file()), None)
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be read: {error.__class__.__name__}. Correct or remove it."
        ) from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = re.fullmatch(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_.]*)\s*=\s*(.*)", stripped)
        if match is None:
            raise SettingsError(f"{path}:{number}: expected KEY=VALUE, a comment or a blank line.")
        found[match.group(1)] = _unquoted(match.group(2), where=f"{path}:{number}")
    return {name: value for name, value in found.items() if value.strip()}


def _unquoted(value: str, *, where: str) -> str:
    if value[:1] in ('"', "'"):
        closed = re.fullmatch(r"(['\"])(.*?)(?<!\\)\1\s*(?:#.*)?", value)
        if closed is None:
            raise SettingsError(f"{where}: the quote is not closed on its line.")
        inner = closed.group(2)
        return re.sub(r"\\([\"\\$])", r"\1", inner) if value[0] == '"' else inner
    return re.sub(r"(?:^|\s)#.*$", "", value).strip()
