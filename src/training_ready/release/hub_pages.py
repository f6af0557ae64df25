"""What does a person see who opens the hub in a browser? Models, revisions, files and the rendered card; no scripts.

Everything that came from outside is escaped, HTML inside a card included, and the policy of the page allows nothing
but this hub's style sheet and pictures.
"""

from __future__ import annotations

from importlib.resources import files as package_files
from itertools import islice
from typing import Any
from urllib.parse import quote, urlsplit

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_cards import card_body
from training_ready.release.hub_routes import CARD_BYTES, Revision, Store, card_of
from training_ready.release.hub_store import Commit, HubStore

_POLICY = "default-src 'none'; img-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; "
_POLICY += "frame-ancestors 'none'"
_COMMITS_SHOWN = 50
_STYLE = """
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; }
header { padding: .75rem 1.5rem; border-bottom: 1px solid #d5dae0; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e9ed; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
a { color: #0b57a4; } small { color: #59636e; } img { max-width: 100%; }
pre { overflow-x: auto; padding: .75rem; background: #f4f6f8; }
article { margin-top: 2rem; padding-top: 1rem; border-top: 1px solid #d5dae0; }
@media (prefers-color-scheme: dark) {
  body { color: #e2e6ea; background: #14181d; } a { color: #7db4ee; } small { color: #9aa4af; }
  pre { background: #1d232a; } header, article, th, td { border-color: #333b44; }
}
"""

router = APIRouter()
_environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _page(**known: Any) -> HTMLResponse:
    source = (package_files(__package__) / "hub_page.html.jinja").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(
        _environment.from_string(source).render(**known), headers=headers | {"Referrer-Policy": "no-referrer"}
    )


@router.get("/-/style.css")
def style() -> Response:
    return Response(_STYLE, media_type="text/css", headers={"X-Content-Type-Options": "nosniff"})


@router.get("/")
def models(store: Store) -> HTMLResponse:
    rows = []
    for repo_id in store.repo_ids():
        try:
            rows.append(_row(store, repo_id))
        except HubError as error:  # one damaged model hides no other
            if error.code != "RepoNotFound":
                rows.append({"repo_id": repo_id, "fault": str(error)})
    return _page(title="Models", models=rows, repo_id=None)


def _row(store: HubStore, repo_id: str) -> dict[str, Any]:
    commit = store.resolve(repo_id, "main")
    return {
        "repo_id": repo_id,
        "fault": None,
        "private": store.repo(repo_id).private,
        "license": card_of(store, commit).get("license"),
        "date": commit.date,
        "branches": len(store.refs(repo_id, "heads")),
    }


@router.get("/{owner}/{name}")
def model(owner: str, name: str, store: Store) -> HTMLResponse:
    return _model_page(store, f"{owner}/{name}", "main")


@router.get("/{owner}/{name}/tree/{revision}")
def model_at(owner: str, name: str, revision: Revision, store: Store) -> HTMLResponse:
    return _model_page(store, f"{owner}/{name}", revision)


def _model_page(store: HubStore, repo_id: str, revision: str) -> HTMLResponse:
    commit = store.resolve(repo_id, revision)
    refs = [
        {"name": ref, "kind": kind, "oid": oid}
        for kind, folder in (("branch", "heads"), ("tag", "tags"))
        for ref, oid in store.refs(repo_id, folder).items()
    ]
    return _page(
        title=repo_id,
        repo_id=repo_id,
        revision=revision,
        commit=commit,
        refs=refs,
        history=list(islice(store.history(repo_id, commit.oid), _COMMITS_SHOWN)),
        card=_rendered_card(store, repo_id, commit),
    )


def _rendered_card(store: HubStore, repo_id: str, commit: Commit) -> Markup | None:
    """The card as HTML in which nothing of the card is HTML; pictures and files are those of this commit."""
    readme = commit.tree.get("README.md")
    if readme is None or readme.size > CARD_BYTES:
        return None
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(card_body(store.blobs.read(readme.sha256).decode(errors="replace")))
    base = f"/{repo_id}/resolve/{commit.oid}/"
    for token in tokens:
        for child in (token, *(token.children or ())):
            _point_inside(child, base)
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))  # noqa: S704  (escaped by markdown-it)


def _point_inside(token: Token, base: str) -> None:
    """Relative addresses mean files beside the card."""
    for name in ("src", "href"):
        address = token.attrGet(name)
        if isinstance(address, str) and address and not address.startswith(("#", "/")):
            parts = urlsplit(address)
            if not parts.scheme and not parts.netloc:
                token.attrSet(name, base + quote(parts.path, safe="/%"))
