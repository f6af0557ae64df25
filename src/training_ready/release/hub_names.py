"""What may a model, a branch or a file be called on a hub, and what stands for it in git?"""

from __future__ import annotations

import hashlib
import re

from training_ready.release.hub_blobs import HubError

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,150}")
OID = re.compile(r"[0-9a-f]{40}")
# First path segments that mean something else in the hub's URLs.
_RESERVED_OWNERS = frozenset({"api", "datasets", "spaces", "buckets", "kernels", "models"})


def pointer_text(sha256: str, size: int) -> bytes:
    """The Git LFS pointer that stands for a large file in a git tree (git-lfs specification v1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    """Git's object id of a blob; the client compares it to skip files that did not change."""
    return hashlib.sha1(b"blob %d\x00" % len(content) + content, usedforsecurity=False).hexdigest()


def check_repo_id(repo_id: str) -> tuple[str, str]:
    """Split `owner/name`, refusing anything that could be read as another place."""
    owner, _, name = repo_id.partition("/")
    well_formed = _NAME.fullmatch(owner) and _NAME.fullmatch(name) and owner not in _RESERVED_OWNERS
    if not well_formed or ".." in repo_id or "--" in repo_id or name.endswith((".git", ".ipynb")):
        raise HubError(
            f"{repo_id!r} is not a repository id: write owner/name with letters, digits, '-', '_' and '.'",
            status=404,
            code="RepoNotFound",
        )
    return owner, name


def check_path(path: str) -> str:
    """A file's path inside a model: relative, POSIX, no dots that climb, no control characters."""
    parts = path.split("/")
    bad = any(part in ("", ".", "..") for part in parts) or parts[0] == ".git"
    if bad or "\\" in path or any(ord(char) < 32 for char in path) or len(path.encode()) > 1000:
        raise HubError(f"{path!r} is not a path inside a repository", status=400)
    return path


def is_ref_name(name: str) -> bool:
    bad = ".." in name or "//" in name or name.endswith(("/", ".", ".lock")) or OID.fullmatch(name)
    return not bad and _REF.fullmatch(name) is not None
