"""How are a model's files listed and fetched on the wire? Tree, paths-info, resolve with Range and ETag."""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_names import pointer_text
from training_ready.release.hub_routes import FilePath, Revision, Store, paged
from training_ready.release.hub_store import Entry

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
# A card's pictures. SVG stays text: opened by itself it could run scripts.
_PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}

router = APIRouter()


@router.get("/api/models/{owner}/{name}/tree/{revision}")
@router.get("/api/models/{owner}/{name}/tree/{revision}/{path:path}")
def tree(
    owner: str,
    name: str,
    revision: Revision,
    request: Request,
    store: Store,
    path: FilePath,
    recursive: bool = False,
    limit: int | None = None,
    cursor: str = "",
) -> JSONResponse:
    found = store.resolve(f"{owner}/{name}", revision).tree
    prefix = f"{path.rstrip('/')}/" if path else ""
    inside = {file: entry for file, entry in found.items() if file.startswith(prefix)}
    if prefix and not inside:
        raise HubError(f"no folder {path!r} at {revision}", status=404, code="EntryNotFound")
    listing = [
        _file(file, entry) for file, entry in inside.items() if recursive or "/" not in file[len(prefix) :]
    ]
    folders = {
        file[:index]
        for file in inside
        for index, char in enumerate(file)
        if char == "/" and index >= len(prefix) and (recursive or "/" not in file[len(prefix) : index])
    }
    entries = [_folder(folder) for folder in sorted(folders)] + listing
    return paged(request, entries, limit, cursor)


@router.post("/api/models/{owner}/{name}/paths-info/{revision}")
async def paths_info(
    owner: str, name: str, revision: Revision, request: Request, store: Store
) -> list[dict[str, Any]]:
    wanted = parse_qs((await request.body()).decode()).get("paths", [])
    found = store.resolve(f"{owner}/{name}", revision).tree
    answers = []
    for path in wanted:
        if path in found:
            answers.append(_file(path, found[path]))
        elif any(file.startswith(f"{path}/") for file in found):
            answers.append(_folder(path))
    return answers


def _file(path: str, entry: Entry) -> dict[str, Any]:
    answer: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.lfs:
        pointer = len(pointer_text(entry.sha256, entry.size))
        answer["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer}
    return answer


def _folder(path: str) -> dict[str, Any]:
    # A git tree's id would need the whole tree; clients only compare it, so any name of the folder will do.
    return {
        "type": "directory",
        "path": path,
        "size": 0,
        "oid": hashlib.sha256(path.encode()).hexdigest()[:40],
    }


@router.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
def resolve(
    owner: str, name: str, revision: Revision, path: FilePath, request: Request, store: Store
) -> Response:
    """The bytes of one file; a Range of bytes is honoured (206)."""
    found = store.resolve(f"{owner}/{name}", revision)
    entry = store.entry(found, path)
    if store.blobs.size(entry.sha256) != entry.size:
        raise HubError(f"the content {entry.sha256} of {path!r} is gone from the hub's storage", status=410)
    headers = {
        "X-Repo-Commit": found.oid,
        "ETag": f'"{entry.sha256 if entry.lfs else entry.oid}"',
        "Accept-Ranges": "bytes",
        # Whatever was uploaded is never rendered as a page by a browser under this origin.
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }
    if entry.lfs:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry.size)}
    kind = "application/octet-stream" if entry.lfs else "text/plain; charset=utf-8"
    headers["Content-Type"] = _PICTURES.get(PurePosixPath(path).suffix.lower(), kind)
    asked = _asked_range(request.headers.get("range"), entry.size)
    start, stop = asked or (0, entry.size)
    if asked and start >= stop:
        raise HubError(f"the range is not within the {entry.size} bytes of {path!r}", status=416)
    headers["Content-Length"] = str(stop - start)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    status = 206 if asked else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    blocks = store.place.blocks(store.blobs.name(entry.sha256), start, stop)
    return StreamingResponse(blocks, status_code=status, headers=headers)


def _asked_range(header: str | None, size: int) -> tuple[int, int] | None:
    """[start, stop) of a Range header; None, the whole, for several ranges at once, as RFC 9110 allows."""
    match = _RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
