"""Who may read this hub, and who may write? Tokens by name, of which only the sha256 is kept.

`tokens.json` beside the models holds {name: {"sha256", "scope", "created_at"}}. A token is 256 random bits, so that
its hash needs no salt; it is shown once, when it is made. A running hub reads the file again every second.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from fastapi import Request

from training_ready.release.hub_blobs import HubError
from training_ready.release.places import Place

FILE = "tokens.json"
Scope = Literal["read", "write"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SECONDS = 1.0
# Requests that change nothing although they are POSTs.
_READING_POSTS = re.compile(r"/api/models/[^/]+/[^/]+/paths-info/[^/]+|/api/validate-yaml")


class Caller(NamedTuple):
    """Whose token a request carries, and what it may do. An open hub calls everybody "anonymous"."""

    name: str
    scope: Scope


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class TokenBook:
    """The tokens of a hub: those of the place, and those given to this process."""

    def __init__(self, place: Place, given: Mapping[str, Scope] | None = None) -> None:
        """`given` are secrets from the environment with their scopes; they live as long as the process."""
        self._place = place
        self._given = {_hash(token): Caller("environment", scope) for token, scope in (given or {}).items()}
        self._reading = threading.Lock()
        self._read_at = float("-inf")
        self._kept: dict[str, Caller] | None = None

    def callers(self) -> Mapping[str, Caller] | None:
        """sha256 of a token to its caller, at most a second old. None where no token was ever made: the hub is open.

        A hub whose last token was revoked is closed, not open; so is a running one whose file is gone.
        """
        with self._reading:
            if time.monotonic() - self._read_at > _SECONDS:
                found = _callers(self._place)
                self._kept = {} if found is None and self._kept is not None else found
                self._read_at = time.monotonic()
            if self._kept is None and not self._given:
                return None
            return (self._kept or {}) | self._given

    def caller_of(self, token: str) -> Caller | None:
        digest, found = _hash(token), None
        for known, caller in (self.callers() or {}).items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def add_token(place: Place, name: str, scope: Scope) -> str:
    """Make a token and return it, the only time it is readable. Raises HubError when `name` has one."""
    if not _NAME.fullmatch(name):
        raise HubError(f"{name!r} is no name for a token: letters, digits, '.', '_' and '-'")
    token = f"tr_{secrets.token_urlsafe(32)}"

    def added(tokens: dict[str, dict[str, str]]) -> None:
        if name in tokens:
            raise HubError(f"there is a token named {name}: revoke it first, or choose another name")
        made = datetime.now(UTC).isoformat(timespec="seconds")
        tokens[name] = {"sha256": _hash(token), "scope": scope, "created_at": made}

    _change(place, added)
    return token


def revoke_token(place: Place, name: str) -> None:
    """Raises HubError when there is no token of that name."""

    def removed(tokens: dict[str, dict[str, str]]) -> None:
        if tokens.pop(name, None) is None:
            raise HubError(f"no token is named {name}; there are: {', '.join(tokens) or 'none'}")

    _change(place, removed)


def list_tokens(place: Place) -> dict[str, dict[str, str]]:
    """{name: {"scope", "created_at"}}."""
    return {
        name: {key: facts[key] for key in ("scope", "created_at")} for name, facts in _read(place).items()
    }


def _callers(place: Place) -> dict[str, Caller] | None:
    if place.size(FILE) is None:
        return None
    return {facts["sha256"]: Caller(name, _scope(facts)) for name, facts in _read(place).items()}


def _scope(facts: Mapping[str, str]) -> Scope:
    return "write" if facts["scope"] == "write" else "read"


def _read(place: Place) -> dict[str, dict[str, str]]:
    return _parsed(place, place.read(FILE))


def _parsed(place: Place, content: bytes | None) -> dict[str, dict[str, str]]:
    try:
        tokens: dict[str, dict[str, str]] = json.loads(content) if content else {}
    except ValueError as error:
        raise HubError(
            f"{place.where}/{FILE} is damaged: remove it and make new tokens", status=500
        ) from error
    return tokens


def _change(place: Place, change: Callable[[dict[str, dict[str, str]]], None]) -> None:
    while True:  # until nobody else changed it meanwhile
        before = place.read(FILE)
        tokens = _parsed(place, before)
        change(tokens)
        if place.swap(FILE, json.dumps(tokens, indent=1).encode(), expected=before):
            return


def check_caller(request: Request, book: TokenBook) -> Caller:
    """Who calls, if they may. Raises HubError 401 without a valid token, 403 for one that may not write.

    A browser gives the token as the password of HTTP Basic, and may only read with it.
    """
    reads = request.method in ("GET", "HEAD") or bool(_READING_POSTS.fullmatch(request.url.path))
    origin = request.headers.get("origin")
    if origin and not reads and origin != str(request.base_url).rstrip("/"):
        raise HubError(f"a page of {origin} may not write to this hub", status=403)
    if book.callers() is None:
        return Caller("anonymous", "write")
    if request.method == "PUT" and "signature" in request.query_params:
        return Caller("signed", "write")  # The signed upload URL is checked by its route.
    if request.url.path == "/api/validate-yaml":
        return Caller("anonymous", "read")  # Clients send no token there; it reads nothing of the hub.
    token = _given_token(request, basic=reads)
    if token is None:
        # As the public Hub answers strangers, whatever there is or is not.
        message = "this hub wants a token: set HF_TOKEN to one that was made for it"
        raise HubError(message, status=401, code="RepoNotFound")
    caller = book.caller_of(token)
    if caller is None:
        # The client tells a bad token from a missing repository by this text only.
        raise HubError("Invalid credentials in Authorization header", status=401)
    if caller.scope == "read" and not reads:
        raise HubError(f"the token {caller.name} may read only: use one with the scope write", status=403)
    return caller


def _given_token(request: Request, *, basic: bool) -> str | None:
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and value:
        return value
    if kind.lower() == "basic" and basic:
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None
