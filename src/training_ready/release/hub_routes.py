"""How is a hub read and arranged on the wire? Repositories, branches, trees, files, cards.

These are the routes that an unmodified `huggingface_hub` 2.4 calls for models; those that receive files are
in :mod:`.hub_upload`.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_cards import card_metadata
from training_ready.release.hub_store import Commit, Entry, HubStore, pointer_text

# The owner of repositories created by a bare name, and the answer to whoami: this hub has one tenant.
LOCAL_OWNER = "local"
# A larger README is served as a file but not parsed for metadata.
_CARD_BYTES = 2**20

router = APIRouter()


def _store(request: Request) -> HubStore:
    store: HubStore = request.app.state.store
    return store


def _revision(revision: str) -> str:
    return unquote(revision)


def _path(path: str = "") -> str:
    return unquote(path)


Store = Annotated[HubStore, Depends(_store)]
# Clients quote the slashes of a branch (feature%2Fx); the app routes on the quoted URL, so unquote here.
Revision = Annotated[str, Depends(_revision)]
FilePath = Annotated[str, Depends(_path)]


def base_url(request: Request) -> str:
    return str(request.base_url).rstrip("/")


# --- repositories ----------------------------------------------------------------------------------------


class RepoRequest(BaseModel):
    name: str
    organization: str | None = None
    type: str | None = None
    visibility: str | None = None
    private: bool | None = None

    def repo_id(self) -> str:
        if self.type not in (None, "model"):
            raise HubError(f"this hub holds models, not a {self.type}")
        return f"{self.organization or LOCAL_OWNER}/{self.name}"


@router.get("/api/whoami-v2")
def whoami() -> dict[str, Any]:
    return {
        "type": "user",
        "name": LOCAL_OWNER,
        "fullname": LOCAL_OWNER,
        "orgs": [],
        "auth": {"type": "access_token"},
    }


@router.post("/api/repos/create")
def create_repo(body: RepoRequest, request: Request, store: Store) -> JSONResponse:
    repo_id = body.repo_id()
    answer = {"url": f"{base_url(request)}/{repo_id}", "name": repo_id, "id": repo_id}
    try:
        store.create_repo(repo_id, private=bool(body.private) or body.visibility == "private")
    except HubError as error:
        if error.status != 409:
            raise
        # With exist_ok the client reads the URL from the refusal.
        return JSONResponse({**answer, "error": str(error)}, status_code=409)
    return JSONResponse(answer)


@router.delete("/api/repos/delete")
def delete_repo(body: RepoRequest, store: Store) -> dict[str, str]:
    store.delete_repo(body.repo_id())
    return {}


@router.get("/api/models")
def list_models(store: Store, search: str = "", author: str = "", limit: int = 1000) -> list[dict[str, Any]]:
    wanted = [
        repo_id
        for repo_id in store.repo_ids()
        if search.lower() in repo_id.lower() and author in ("", repo_id.partition("/")[0])
    ]
    return [
        _model_info(store, repo_id, store.resolve(repo_id, "main"), blobs=False) for repo_id in wanted[:limit]
    ]


@router.get("/api/models/{owner}/{name}")
def model_info(owner: str, name: str, store: Store, blobs: bool = False) -> dict[str, Any]:
    repo_id = f"{owner}/{name}"
    return _model_info(store, repo_id, store.resolve(repo_id, "main"), blobs=blobs)


@router.get("/api/models/{owner}/{name}/revision/{revision}")
def model_info_at(
    owner: str, name: str, revision: Revision, store: Store, blobs: bool = False
) -> dict[str, Any]:
    repo_id = f"{owner}/{name}"
    return _model_info(store, repo_id, store.resolve(repo_id, revision), blobs=blobs)


def _model_info(store: HubStore, repo_id: str, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    repo = store.repo(repo_id)
    card = _card(store, commit)
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.tree]
    if blobs:
        for sibling, entry in zip(siblings, commit.tree.values(), strict=True):
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.lfs:
                sibling["lfs"] = {
                    "sha256": entry.sha256,
                    "size": entry.size,
                    "pointerSize": _pointer_size(entry),
                }
    return {
        "_id": repo_id,
        "id": repo_id,
        "modelId": repo_id,
        "author": repo_id.partition("/")[0],
        "sha": commit.oid,
        "createdAt": repo.created_at,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "tags": card.get("tags") or [],
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card or None,
        "siblings": siblings,
    }


def _card(store: HubStore, commit: Commit) -> dict[str, Any]:
    readme = commit.tree.get("README.md")
    if readme is None or readme.size > _CARD_BYTES:
        return {}
    try:
        return card_metadata(store.blobs.path(readme.sha256).read_text(errors="replace"))
    except (ValueError, OSError):
        return {}  # A broken card must not hide the model; validate-yaml is where it is reported.


# --- branches, tags, history -----------------------------------------------------------------------------


@router.get("/api/models/{owner}/{name}/refs")
def refs(owner: str, name: str, store: Store) -> dict[str, Any]:
    def listed(kind: str) -> list[dict[str, str]]:
        found = store.refs(f"{owner}/{name}", kind)
        return [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": oid} for ref, oid in found.items()]

    return {"branches": listed("heads"), "tags": listed("tags"), "converts": [], "pullRequests": []}


@router.post("/api/models/{owner}/{name}/branch/{revision}")
def create_branch(
    owner: str, name: str, revision: Revision, body: dict[str, Any], store: Store
) -> dict[str, str]:
    store.create_ref(f"{owner}/{name}", "heads", revision, revision=str(body.get("startingPoint") or "main"))
    return {}


@router.delete("/api/models/{owner}/{name}/branch/{revision}")
def delete_branch(owner: str, name: str, revision: Revision, store: Store) -> dict[str, str]:
    store.delete_ref(f"{owner}/{name}", "heads", revision)
    return {}


@router.post("/api/models/{owner}/{name}/tag/{revision}")
def create_tag(
    owner: str, name: str, revision: Revision, body: dict[str, Any], store: Store
) -> dict[str, str]:
    store.create_ref(f"{owner}/{name}", "tags", str(body.get("tag", "")), revision=revision)
    return {}


@router.delete("/api/models/{owner}/{name}/tag/{revision}")
def delete_tag(owner: str, name: str, revision: Revision, store: Store) -> dict[str, str]:
    store.delete_ref(f"{owner}/{name}", "tags", revision)
    return {}


@router.get("/api/models/{owner}/{name}/commits/{revision}")
def commits(owner: str, name: str, revision: Revision, store: Store) -> list[dict[str, Any]]:
    return [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": LOCAL_OWNER}],
        }
        for commit in store.history(f"{owner}/{name}", revision)
    ]


# --- download --------------------------------------------------------------------------------------------


@router.get("/api/models/{owner}/{name}/tree/{revision}")
@router.get("/api/models/{owner}/{name}/tree/{revision}/{path:path}")
def tree(
    owner: str, name: str, revision: Revision, store: Store, path: FilePath, recursive: bool = False
) -> list[dict[str, Any]]:
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
    return [_folder(folder) for folder in sorted(folders)] + listing


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


def _pointer_size(entry: Entry) -> int:
    return len(pointer_text(entry.sha256, entry.size))


def _file(path: str, entry: Entry) -> dict[str, Any]:
    answer: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.lfs:
        answer["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
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
def resolve(owner: str, name: str, revision: Revision, path: FilePath, store: Store) -> FileResponse:
    """The bytes of one file; Range is honoured (206)."""
    found = store.resolve(f"{owner}/{name}", revision)
    entry = store.entry(found, path)
    if store.blobs.size(entry.sha256) is None:
        raise HubError(f"the content {entry.sha256} of {path!r} is gone from the hub's folder", status=410)
    headers = {
        "X-Repo-Commit": found.oid,
        "ETag": f'"{entry.sha256 if entry.lfs else entry.oid}"',
        # Whatever was uploaded is never rendered by a browser under this origin.
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }
    if entry.lfs:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry.size)}
    kind = "application/octet-stream" if entry.lfs else "text/plain; charset=utf-8"
    return FileResponse(store.blobs.path(entry.sha256), headers=headers, media_type=kind)


@router.get("/{owner}/{name}")
def readme(owner: str, name: str, store: Store) -> Response:
    """A model's card as plain text, so that its URL can be opened."""
    found = store.resolve(f"{owner}/{name}", "main")
    if "README.md" not in found.tree:
        return PlainTextResponse(f"{owner}/{name} at {found.oid} has no README.md yet\n")
    return PlainTextResponse(store.blobs.path(found.tree["README.md"].sha256).read_bytes())


# --- model cards -----------------------------------------------------------------------------------------


class ValidateRequest(BaseModel):
    content: str


@router.post("/api/validate-yaml")
def validate_yaml(body: ValidateRequest) -> JSONResponse:
    try:
        metadata = card_metadata(body.content)
    except ValueError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, status_code=400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in the model card"}]
    return JSONResponse({"errors": [], "warnings": warnings})
