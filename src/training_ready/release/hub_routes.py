"""How are models found and arranged on the wire? Repositories, branches, tags, history, cards.

These are the routes that an unmodified `huggingface_hub` 2.4 calls for models; files leave by :mod:`.hub_downloads`
and enter by :mod:`.hub_upload`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_cards import card_metadata
from training_ready.release.hub_names import pointer_text
from training_ready.release.hub_store import Commit, HubStore
from training_ready.release.hub_tokens import Caller

# The owner of repositories created by a bare name, and the answer to whoami: this hub has one tenant.
LOCAL_OWNER = "local"
# A larger README is served as a file but not parsed for metadata.
CARD_BYTES = 2**20
# Items of one answer to a listing; the rest follows by the Link header.
PAGE = 1000

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


def paged(
    request: Request,
    items: Sequence[Any],
    limit: int | None,
    cursor: str,
    render: Callable[[Any], Any] = lambda item: item,
) -> JSONResponse:
    """One page of a listing; the Link header names the next, as the client follows it. `cursor` counts items.

    What is gone by the time it is rendered (None) is left out.
    """
    start = int(cursor) if cursor.isdecimal() else 0
    stop = start + max(1, min(limit or PAGE, PAGE))
    headers = {}
    if stop < len(items):
        headers["Link"] = f'<{request.url.include_query_params(cursor=stop)}>; rel="next"'
    rendered = [render(item) for item in items[start:stop]]
    return JSONResponse([item for item in rendered if item is not None], headers=headers)


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
def whoami(request: Request) -> dict[str, Any]:
    caller: Caller = request.state.caller
    token = {"displayName": caller.name, "role": caller.scope}
    return {
        "type": "user",
        "name": LOCAL_OWNER,
        "fullname": LOCAL_OWNER,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
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
def list_models(
    request: Request,
    store: Store,
    search: str = "",
    author: str = "",
    limit: int | None = None,
    cursor: str = "",
) -> JSONResponse:
    wanted = [
        repo_id
        for repo_id in store.repo_ids()
        if search.lower() in repo_id.lower() and author in ("", repo_id.partition("/")[0])
    ]
    return paged(request, wanted, limit, cursor, lambda repo_id: _listed(store, repo_id))


def _listed(store: HubStore, repo_id: str) -> dict[str, Any] | None:
    """The model as a listing has it; a damaged one is marked and hides no other."""
    try:
        return _model_info(store, repo_id, store.resolve(repo_id, "main"), blobs=False)
    except HubError as error:
        if error.code == "RepoNotFound":
            return None
        return {
            "_id": repo_id,
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.partition("/")[0],
            "disabled": True,  # the public Hub's own word for a model that cannot be fetched
            "tags": ["damaged"],
            "error": str(error),
        }


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
    card = card_of(store, commit)
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.tree]
    if blobs:
        for sibling, entry in zip(siblings, commit.tree.values(), strict=True):
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.lfs:
                sibling["lfs"] = {
                    "sha256": entry.sha256,
                    "size": entry.size,
                    "pointerSize": len(pointer_text(entry.sha256, entry.size)),
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


def card_of(store: HubStore, commit: Commit) -> dict[str, Any]:
    readme = commit.tree.get("README.md")
    if readme is None or readme.size > CARD_BYTES:
        return {}
    try:
        return card_metadata(store.blobs.read(readme.sha256).decode(errors="replace"))
    except (ValueError, HubError):
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
def commits(
    owner: str,
    name: str,
    revision: Revision,
    request: Request,
    store: Store,
    limit: int | None = None,
    cursor: str = "",
) -> JSONResponse:
    found = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": LOCAL_OWNER}],
        }
        for commit in store.history(f"{owner}/{name}", revision)
    ]
    return paged(request, found, limit, cursor)


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
