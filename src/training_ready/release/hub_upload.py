"""How do files enter the hub on the wire? Preupload, Git LFS, and the commit that makes them visible.

Large files travel by Git LFS (batch, PUT, verify), small ones inside the commit; Xet is not spoken. The PUT
carries no token in this protocol, so its URL is signed for one content, one size and one day.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel

from training_ready.release.hub_blobs import HubError, IncomingBlob
from training_ready.release.hub_names import check_path
from training_ready.release.hub_routes import Revision, Store, base_url
from training_ready.release.hub_store import Entry, HubStore

# Up to here a text file is sent inside the commit (as base64, one line of it); larger or binary ones by LFS.
INLINE_BYTES = 5 * 2**20
_MAX_COMMIT_LINE = 2 * INLINE_BYTES
_UPLOAD_SECONDS = 24 * 3600

router = APIRouter()


class PreuploadFile(BaseModel):
    path: str
    size: int
    sample: str = ""


class PreuploadRequest(BaseModel):
    files: list[PreuploadFile]


@router.post("/api/models/{owner}/{name}/preupload/{revision}")
def preupload(
    owner: str, name: str, revision: Revision, body: PreuploadRequest, store: Store, create_pr: bool = False
) -> dict[str, Any]:
    """Say how each file travels, and its present id so that the client skips it when nothing changed."""
    _refuse_pull_request(create_pr)
    tree = store.resolve(f"{owner}/{name}", revision).tree
    answers = []
    for file in body.files:
        binary = _is_binary(_decoded(file.sample))
        current = tree.get(check_path(file.path))
        if current is not None and store.blobs.size(current.sha256) != current.size:
            current = None  # lost or set aside: have it sent again
        answers.append(
            {
                "path": file.path,
                "uploadMode": "lfs" if binary or file.size > INLINE_BYTES else "regular",
                "shouldIgnore": False,
                "oid": None if current is None else current.sha256 if current.lfs else current.oid,
            }
        )
    return {"files": answers}


def _whole_text(text: str) -> str:
    text.encode()  # JSON can say half a character, which no answer of the hub could repeat
    return text


Text = Annotated[str, AfterValidator(_whole_text)]


class CommitHeader(BaseModel):
    summary: Text | None = None
    description: Text | None = None
    parentCommit: str | None = None


class CommitItem(BaseModel):
    path: Text
    content: Text = ""
    encoding: str | None = None
    oid: str = ""


class LfsObject(BaseModel):
    oid: str
    size: int


class LfsBatchRequest(BaseModel):
    operation: str
    objects: list[LfsObject]


@router.post("/{owner}/{name}.git/info/lfs/objects/batch")
def lfs_batch(owner: str, name: str, body: LfsBatchRequest, request: Request, store: Store) -> dict[str, Any]:
    """Git LFS batch API: a signed URL for every object that is not here yet."""
    store.repo(f"{owner}/{name}")
    if body.operation != "upload":
        raise HubError("download large files from /resolve/, not by LFS")
    prefix = f"{base_url(request)}/{owner}/{name}.git/info/lfs/objects"
    answers: list[dict[str, Any]] = []
    for wanted in body.objects:
        answer: dict[str, Any] = {"oid": wanted.oid, "size": wanted.size}
        if store.blobs.size(wanted.oid) != wanted.size:
            expires = int(time.time()) + _UPLOAD_SECONDS
            signature = _signature(request, wanted.oid, wanted.size, expires)
            query = f"size={wanted.size}&expires={expires}&signature={signature}"
            upload = {"href": f"{prefix}/{wanted.oid}?{query}", "header": {}}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{prefix}/verify", "header": {}}}
        answers.append(answer)
    return {"transfer": "basic", "objects": answers, "hash_algo": "sha256"}


def _signature(request: Request, oid: str, size: int, expires: int) -> str:
    key: bytes = request.app.state.signing_key
    return hmac.new(key, f"{oid}:{size}:{expires}".encode(), hashlib.sha256).hexdigest()


@router.put("/{owner}/{name}.git/info/lfs/objects/{oid}")
async def lfs_upload(
    owner: str, name: str, oid: str, size: int, expires: int, signature: str, request: Request, store: Store
) -> Response:
    """Receive one large file. Stored only if its sha256 and size are those of the signed URL."""
    expected = _signature(request, oid, size, expires)
    if not hmac.compare_digest(expected.encode(), signature.encode()) or expires < time.time():
        raise HubError(
            "this upload URL is not one of mine or has expired; start the upload again", status=403
        )
    incoming = IncomingBlob(store.blobs)
    try:
        async for chunk in request.stream():
            await run_in_threadpool(incoming.write, chunk)
            if incoming.size > size:
                raise HubError(
                    f"more than the announced {size} bytes arrived; nothing was stored", status=422
                )
        await run_in_threadpool(incoming.keep, sha256=oid, size=size)
    finally:
        incoming.discard()
    return Response()


@router.post("/{owner}/{name}.git/info/lfs/objects/verify")
def lfs_verify(owner: str, name: str, body: LfsObject, store: Store) -> dict[str, str]:
    if store.blobs.size(body.oid) != body.size:
        raise HubError(f"no upload {body.oid} of {body.size} bytes is here", status=404)
    return {}


@router.post("/api/models/{owner}/{name}/commit/{revision}")
async def commit(
    owner: str, name: str, revision: Revision, request: Request, store: Store, create_pr: bool = False
) -> dict[str, Any]:
    """One commit from newline-delimited JSON: a header, then files, LFS files and deletions."""
    _refuse_pull_request(create_pr)
    repo_id = f"{owner}/{name}"
    store.resolve(repo_id, revision)
    header = CommitHeader()
    edits: list[tuple[str, Entry | None]] = []
    async for line in _lines(request):
        try:
            item = json.loads(line)
            if item["key"] == "header":
                header = CommitHeader.model_validate(item["value"])
            else:
                value = CommitItem.model_validate(item["value"])
                edits.append(await run_in_threadpool(_edit, store, str(item["key"]), value))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise HubError(f"line {len(edits) + 1} of the commit cannot be read: {error!r}") from error
    oid = await run_in_threadpool(
        store.commit,
        repo_id,
        revision,
        edits,
        title=header.summary or "Upload",
        message=header.description or "",
        parent=header.parentCommit,
    )
    return {"success": True, "commitOid": oid, "commitUrl": f"{base_url(request)}/{repo_id}/commit/{oid}"}


def _edit(store: HubStore, key: str, value: CommitItem) -> tuple[str, Entry | None]:
    path = value.path
    if key == "file":
        check_path(path)
        data = _decoded(value.content) if value.encoding == "base64" else value.content.encode()
        return path, store.small_entry(data)
    if key == "lfsFile":
        return path, store.lfs_entry(value.oid)
    if key == "deletedFile":
        return path, None
    if key == "deletedFolder":
        return path.rstrip("/") + "/", None
    raise HubError(f"commit operation {key!r} is not one this hub knows")


async def _lines(request: Request) -> AsyncIterator[bytes]:
    buffer = bytearray()
    async for chunk in request.stream():
        buffer += chunk
        while (end := buffer.find(b"\n")) >= 0:
            line, buffer = bytes(buffer[:end]), buffer[end + 1 :]
            if line.strip():
                yield line
        if len(buffer) > _MAX_COMMIT_LINE:
            raise HubError(f"a file inside a commit may have {INLINE_BYTES} bytes; use LFS", status=413)
    if buffer.strip():
        yield bytes(buffer)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise HubError(f"not base64: {error}") from error


def _is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file are no text; a character cut off at their end does not count."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return True
    return b"\x00" in sample


def _refuse_pull_request(create_pr: bool) -> None:
    if create_pr:
        raise HubError("this hub has no pull requests; commit to a branch", status=501)
