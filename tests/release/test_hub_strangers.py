"""What strangers, long listings and browsers get from a hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from training_ready.release.connection import without_xet
from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_commands import hub_check
from training_ready.release.hub_server import EmbeddedHub

from .test_hub import REPO, raw

EVIL = """---
license: mit
---
# Hello <script>alert(1)</script>

<img src=x onerror=alert(2)> [bad](javascript:alert(3)) [good](notes.txt) ![loss](loss.png)

| a | b |
| - | - |
| 1 | 2 |
"""


# --- strangers


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/resolve/main/passwd",
        "/%2e%2e/%2e%2e/resolve/main/passwd",
        "/..%2f..%2fetc/x/resolve/main/passwd",
        "/api/models/../../../etc/passwd",
        "/api/models/%2e%2e/x",
        "/api/models/me/model/revision/..%2f..%2fheads%2fmain",
        "/api/models/me/model/tree/%2e%2e%2f%2e%2e%2frepo.json",
        "/me/model/resolve/main/..%2f..%2frepo.json",
        "/me/model/resolve/main/%2fetc%2fpasswd",
        "/me/model/resolve/%2e%2e%2ftags%2fv1/a.txt",
        "/me/model%00/resolve/main/a.txt",
    ],
)
def test_no_url_leaves_the_root(api: HfApi, hub: EmbeddedHub, path: str) -> None:
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a.txt")
    answer = raw(hub, "GET", path)
    assert answer.status in (400, 404), (answer.status, answer.read())


@pytest.mark.parametrize(
    "path", ["../x", "/etc/x", "a/../../x", "a//b", "a\\b", ".git/config", "a/./b", "a\nb", ""]
)
def test_no_commit_holds_a_path_that_climbs(api: HfApi, hub: EmbeddedHub, path: str) -> None:
    api.create_repo(REPO)
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}},
    ]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    assert raw(hub, "POST", f"/api/models/{REPO}/commit/main", body).status == 400
    assert api.list_repo_files(REPO) == []


@pytest.mark.parametrize(
    "repo_id", ["a", "../x", "a/..", "a/b/c", "a/b.git", "api/models", "a/--b", "-a/b", "a/b c"]
)
def test_no_repository_has_a_name_that_means_something_else(hub: EmbeddedHub, repo_id: str) -> None:
    owner, _, name = repo_id.partition("/")
    body = json.dumps({"name": name, "organization": owner}).encode()
    answer = raw(hub, "POST", "/api/repos/create", body, Content_Type="application/json")
    assert answer.status == 404
    assert list(hub.place.names("repos/")) == []


def test_a_commit_of_odd_values_is_refused_as_one(api: HfApi, hub: EmbeddedHub) -> None:
    api.create_repo(REPO)
    odd = [
        {"key": "header", "value": {"summary": "x", "parentCommit": 7}},
        {"key": "header", "value": {"summary": "x", "parentCommit": ["main"]}},
        {"key": "header", "value": {"summary": "\ud800"}},
        {"key": "header", "value": "x"},
        {"key": "deletedFile", "value": {"path": 7}},
        {"key": "deletedFile", "value": {"path": None}},
        {"key": "deletedFile", "value": {"path": "\ud800"}},
        {"key": "deletedFile", "value": {}},
        {"key": "deletedFolder", "value": {"path": ["a"]}},
        {"key": "file", "value": {"path": "a", "content": 7}},
        {"key": "lfsFile", "value": {"path": "a", "oid": 7}},
        {"key": ["file"], "value": {"path": "a"}},
        ["key"],
        None,
    ]
    for line in (*(json.dumps(item).encode() for item in odd), b"[" * 200_000):
        answer = raw(hub, "POST", f"/api/models/{REPO}/commit/main", line)
        assert answer.status == 400, (line[:80], answer.read())
    assert len(api.list_repo_commits(REPO)) == 1


def test_a_file_cannot_be_inside_a_file(api: HfApi) -> None:
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a")
    with pytest.raises(HfHubHTTPError, match="file and a folder"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a/b")


def test_a_web_page_cannot_use_a_loopback_hub(hub: EmbeddedHub) -> None:
    body = json.dumps({"name": "m", "organization": "me"}).encode()
    kind = {"Content_Type": "application/json"}
    assert raw(hub, "POST", "/api/repos/create", body, **kind, Origin="http://evil.example").status == 403
    assert raw(hub, "GET", "/api/models", Host="evil.example").status == 400
    assert list(hub.place.names("repos/")) == []


# --- long listings


def test_listings_longer_than_a_page_are_followed(api: HfApi, hub: EmbeddedHub) -> None:
    api.create_repo(REPO)
    many = [CommitOperationAdd(f"{number:04}.txt", b"same") for number in range(1005)]
    api.create_commit(REPO, many, commit_message="many")
    assert len(api.list_repo_files(REPO)) == 1005
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [
        f"{number:04}.txt" for number in range(1005)
    ]
    page = raw(hub, "GET", f"/api/models/{REPO}/tree/main?limit=2&cursor=1003")
    assert [entry["path"] for entry in json.load(page)] == ["1003.txt", "1004.txt"]
    assert "Link" not in page.headers
    api.create_repo("me/second")
    first = raw(hub, "GET", "/api/models?limit=1")
    assert [model["id"] for model in json.load(first)] == [REPO]
    link = first.headers["Link"]
    assert link.endswith('>; rel="next"')
    following = raw(hub, "GET", link[1 : link.index(">")].removeprefix(hub.endpoint_url))
    assert [model["id"] for model in json.load(following)] == ["me/second"]
    assert [model.id for model in api.list_models(limit=1)] == [REPO]


# --- the page


def page(hub: EmbeddedHub, path: str) -> str:
    answer = raw(hub, "GET", path)
    assert answer.status == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    return answer.read().decode()


def test_the_page_lists_models_revisions_files_and_the_rendered_card(api: HfApi, hub: EmbeddedHub) -> None:
    assert "holds no models yet" in page(hub, "/")
    api.create_repo(REPO, private=True)
    assert "No files yet" in page(hub, f"/{REPO}")
    first = api.upload_file(repo_id=REPO, path_or_fileobj=EVIL.encode(), path_in_repo="README.md").oid
    api.upload_file(repo_id=REPO, path_or_fileobj=b"\x89PNG\0", path_in_repo="loss.png")
    api.create_tag(REPO, tag="v1", revision=first)
    api.create_branch(REPO, branch="feature/x", revision=first)
    listing = page(hub, "/")
    assert f'<a href="/{REPO}">{REPO}</a> <small>private</small>' in listing
    assert "<td>mit</td>" in listing
    main = page(hub, f"/{REPO}")
    head = api.repo_info(REPO).sha
    assert "<h1>Hello &lt;script&gt;alert(1)&lt;/script&gt;</h1>" in main
    assert "<table>\n<thead>\n<tr>\n<th>a</th>" in main
    assert f'<img src="/{REPO}/resolve/{head}/loss.png" alt="loss"' in main
    assert f'<a href="/{REPO}/resolve/{head}/notes.txt">good</a>' in main
    assert "<script" not in main
    assert "<img src=x" not in main
    assert 'href="javascript' not in main
    assert "license: mit" not in main
    assert f'href="/{REPO}/tree/feature%2Fx"' in main
    assert f'href="/{REPO}/tree/v1"' in main
    old = page(hub, f"/{REPO}/tree/feature%2Fx")
    assert f"at commit <code>{first}</code>" in old
    assert f"resolve/{first}/README.md" in old
    picture = raw(hub, "GET", f"/{REPO}/resolve/main/loss.png")
    assert picture.headers["Content-Type"] == "image/png"
    assert raw(hub, "GET", "/-/style.css").headers["Content-Type"].startswith("text/css")


def test_nothing_of_a_model_becomes_markup(api: HfApi, hub: EmbeddedHub) -> None:
    api.create_repo(REPO)
    api.create_commit(
        REPO, [CommitOperationAdd("<b>x</b>.txt", b"x")], commit_message="<script>alert(1)</script>"
    )
    main = page(hub, f"/{REPO}")
    assert "&lt;b&gt;x&lt;/b&gt;.txt" in main
    assert "<b>x" not in main
    assert "<script" not in main


@pytest.mark.parametrize(
    "value",
    ["2026-11-22", ".nan", '"\\ud800"', "!!int ''", "[" * 3000],
    ids=["date", "nan", "half", "tag", "deep"],
)
def test_no_card_hides_the_models(api: HfApi, hub: EmbeddedHub, value: str) -> None:
    """The metadata of a card may be YAML that JSON has no word for, or that PyYAML stumbles over."""
    api.create_repo(REPO)
    card = {"path": "README.md", "content": f"---\nwhat: {value}\n---\n# Hello"}
    lines = [{"key": "header", "value": {"summary": "card"}}, {"key": "file", "value": card}]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    assert raw(hub, "POST", f"/api/models/{REPO}/commit/main", body).status == 200
    assert [model.id for model in api.list_models()] == [REPO]
    assert api.repo_info(REPO).id == REPO
    assert "<h1>Hello</h1>" in page(hub, f"/{REPO}")


# --- damage


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("repo.json", b"", "JSONDecodeError"),
        ("refs/heads/main", b"\xff", "names no commit"),
        ("refs/heads/main", None, "no revision"),
        ("commits/{oid}.json", b"{}", "no longer has the hash in its name"),
    ],
)
def test_a_damaged_model_hides_no_other(tmp_path: Path, name: str, content: bytes | None, why: str) -> None:
    root = tmp_path / "hub"
    with EmbeddedHub(root) as hub, without_xet(hub.endpoint_url):
        api = HfApi(endpoint=hub.endpoint_url, token=False)
        for repo_id in ("me/first", "me/second", "me/third"):
            oid = upload(api, repo_id)
            if repo_id == "me/second":
                victim = root / "repos" / repo_id / name.format(oid=oid)
    victim.unlink()
    if content is not None:
        victim.write_bytes(content)
    with EmbeddedHub(root) as hub, without_xet(hub.endpoint_url):
        api = HfApi(endpoint=hub.endpoint_url, token=False)
        listed = {model.id: model for model in api.list_models()}
        assert {name: bool(model.disabled) for name, model in listed.items()} == {
            "me/first": False,
            "me/second": True,
            "me/third": False,
        }
        assert why in listed["me/second"].error
        page = raw(hub, "GET", "/").read().decode()
        assert [f'href="/{name}"' in page for name in listed] == [True, False, True]
        assert why in page
    with pytest.raises(HubError, match=r"1 of 3 models cannot be read(.|\n)*me/second"):
        hub_check(str(root))
    with pytest.raises(HubError, match="me/second"):  # what the damaged one needs is not known
        hub_check(str(root), delete_unreferenced=True)
    with EmbeddedHub(root) as hub, without_xet(hub.endpoint_url):
        api = HfApi(endpoint=hub.endpoint_url, token=False)
        api.delete_repo("me/second")
        assert [model.id for model in api.list_models()] == ["me/first", "me/third"]
        upload(api, "me/second")
    hub_check(str(root), delete_unreferenced=True)


def upload(api: HfApi, repo_id: str) -> str:
    api.create_repo(repo_id)
    return api.upload_file(repo_id=repo_id, path_or_fileobj=repo_id.encode(), path_in_repo="a.txt").oid
