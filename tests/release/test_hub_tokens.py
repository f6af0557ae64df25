"""Who may use a hub: tokens by scope, as the unmodified client meets them; and the folder between two hubs."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from training_ready.release.connection import without_xet
from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_commands import hub_token_add, hub_token_ls, hub_token_revoke
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.hub_tokens import add_token, revoke_token
from training_ready.release.place_bucket import BucketPlace
from training_ready.release.place_folder import FolderPlace
from training_ready.release.places import Place, PlaceError
from training_ready.storage.objects import ObjectStore

from .conftest import use
from .test_hub import REPO, raw


def client(hub: EmbeddedHub, token: str | bool) -> HfApi:
    return HfApi(endpoint=hub.endpoint_url, token=token)


def status_of(attempt: Callable[[], object]) -> int:
    with pytest.raises(HfHubHTTPError) as refused:
        attempt()
    return refused.value.response.status_code


def test_a_token_is_wanted_for_everything(tmp_path: Path) -> None:
    secret = "correct-horse"
    with EmbeddedHub(tmp_path / "hub", token=secret) as hub, without_xet(hub.endpoint_url):
        friend = HfApi(endpoint=hub.endpoint_url, token=secret)
        friend.create_repo(REPO)
        friend.upload_file(repo_id=REPO, path_or_fileobj=os.urandom(9000), path_in_repo="w.bin")
        for token in ("wrong", False):
            stranger = HfApi(endpoint=hub.endpoint_url, token=token)
            for attempt in (
                lambda api=stranger: api.repo_info(REPO),
                lambda api=stranger: api.create_repo("me/other"),
                lambda api=stranger: api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x"),
                lambda api=stranger: api.delete_repo(REPO),
            ):
                with pytest.raises(HfHubHTTPError) as refused:
                    attempt()
                assert refused.value.response.status_code == 401
        assert raw(hub, "GET", f"/{REPO}/resolve/main/w.bin").status == 401
        assert (
            raw(
                hub, "PUT", f"/{REPO}.git/info/lfs/objects/{'0' * 64}?size=1&expires=1&signature=x", b"x"
            ).status
            == 403
        )
        assert friend.list_repo_files(REPO) == ["w.bin"]
        assert hub.environment()["HF_TOKEN"] == secret


def test_a_token_that_reads_does_not_write(tmp_path: Path) -> None:
    with (
        EmbeddedHub(tmp_path / "hub", token="may-write", read_token="may-read") as hub,
        without_xet(hub.endpoint_url),
    ):
        writer, reader = client(hub, "may-write"), client(hub, "may-read")
        writer.create_repo(REPO)
        writer.upload_file(repo_id=REPO, path_or_fileobj=b"\0one", path_in_repo="w.bin")
        assert reader.list_repo_files(REPO) == ["w.bin"]
        assert [info.path for info in reader.get_paths_info(REPO, ["w.bin"])] == ["w.bin"]
        for attempt in (
            lambda: reader.create_repo("me/other"),
            lambda: reader.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x"),
            lambda: reader.create_branch(REPO, branch="b"),
            lambda: reader.create_tag(REPO, tag="t"),
            lambda: reader.delete_file("w.bin", REPO),
            lambda: reader.delete_repo(REPO),
        ):
            assert status_of(attempt) == 403
        roles = [api.whoami()["auth"]["accessToken"]["role"] for api in (writer, reader)]
        assert roles == ["write", "read"]
        with pytest.raises(RepositoryNotFoundError):  # the client's word for "no token, or no such model"
            client(hub, False).repo_info(REPO)
        with pytest.raises(RepositoryNotFoundError):
            writer.repo_info("me/nowhere")
        with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
            client(hub, "wrong").repo_info(REPO)


def test_a_hub_for_others_answers_to_any_of_its_names(tmp_path: Path) -> None:
    with EmbeddedHub(tmp_path / "hub", host="0.0.0.0", token="may-write") as hub:
        asked = raw(hub, "GET", "/api/models", Host="models.example", Authorization="Bearer may-write")
        assert asked.status == 200
        assert raw(hub, "GET", "/api/models", Host="models.example").status == 401


@pytest.mark.parametrize("storage", ["folder", "bucket"])
def test_a_token_is_made_kept_as_a_hash_and_revoked(
    tmp_path: Path, storage: str, request: pytest.FixtureRequest
) -> None:
    place = (
        FolderPlace(tmp_path / "hub")
        if storage == "folder"
        else BucketPlace(request.getfixturevalue("moto_store"), "hub")
    )
    token = add_token(place, "laptop", "write")
    with pytest.raises(HubError, match="there is a token named laptop"):
        add_token(place, "laptop", "read")
    kept = place.read("tokens.json") or b""
    assert token.encode() not in kept
    with EmbeddedHub(place) as hub:
        api = client(hub, token)
        api.create_repo(REPO)
        other = add_token(place, "server", "read")
        deadline = time.monotonic() + 20
        while raw(hub, "GET", "/api/models", Authorization=f"Bearer {other}").status != 200:
            assert time.monotonic() < deadline, "the hub never learned of a token that was added"
            time.sleep(0.05)
        revoke_token(place, "laptop")
        revoke_token(place, "server")
        while raw(hub, "GET", "/api/models", Authorization=f"Bearer {token}").status != 401:
            assert time.monotonic() < deadline, "the hub never learned of the revocation"
            time.sleep(0.05)
        assert raw(hub, "GET", "/api/models").status == 401, "a hub whose last token was revoked became open"
        with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
            api.repo_info(REPO)
        assert token not in str(refused.value)
        place.delete("tokens.json")
        time.sleep(1.1)  # until the hub has looked again
        assert raw(hub, "GET", "/api/models").status == 401, "a hub whose tokens were lost became open"


def test_the_token_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "hub")
    (tmp_path / "photos").mkdir()
    for wrong in (root, str(tmp_path / "photos")):
        with pytest.raises(HubError, match=rf"no hub in {wrong}.*hub token add NAME --root {wrong} --create"):
            hub_token_add("laptop", wrong, "write")
    assert [path.name for path in tmp_path.rglob("*")] == ["photos"]
    hub_token_add("laptop", root, "write", create=True)
    token = capsys.readouterr().out.strip()
    assert len(token) > 40
    with pytest.raises(HubError, match="neither read nor write"):
        hub_token_add("other", root, "admin")
    hub_token_ls(root)
    listed = capsys.readouterr().out
    assert "laptop  write" in listed
    assert token not in listed
    kept = tmp_path / "hub" / "tokens.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    hub_token_revoke("laptop", root)
    assert json.loads(kept.read_text()) == {}
    with pytest.raises(HubError, match="no token is named laptop"):
        hub_token_revoke("laptop", root)


def test_a_bucket_that_is_no_hub_gets_no_token(
    moto_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(moto_store, monkeypatch)
    root = moto_store.uri("hub")
    with pytest.raises(HubError, match="there is no hub in"):
        hub_token_add("laptop", root)
    assert list(moto_store.list()) == []
    with EmbeddedHub(BucketPlace(moto_store, "hub")) as hub:
        client(hub, False).create_repo(REPO)
    hub_token_add("laptop", root)
    assert moto_store.exists("hub/tokens.json")


def test_a_browser_reads_with_the_token_as_its_password(tmp_path: Path) -> None:
    with EmbeddedHub(tmp_path / "hub", token="may-write") as hub:
        asked = raw(hub, "GET", "/")
        assert (asked.status, asked.headers["WWW-Authenticate"][:5]) == (401, "Basic")
        basic = f"Basic {base64.b64encode(b'me:may-write').decode()}"
        assert raw(hub, "GET", "/", Authorization=basic).status == 200
        body = json.dumps({"name": "m", "organization": "me"}).encode()
        headers = {"Content_Type": "application/json", "Authorization": basic}
        assert raw(hub, "POST", "/api/repos/create", body, **headers).status == 401


def test_a_store_that_ignores_conditions_is_refused_unless_nobody_else_writes(store: ObjectStore) -> None:
    """The embedded store answers 200 to a PUT whose condition does not hold; two hubs over it could undo each other."""
    with pytest.raises(PlaceError, match=r"does not honour conditional writes.*--only-writer"):
        BucketPlace(store, "hub")
    assert list(store.list("hub")) == []
    place = BucketPlace(store, "hub", only_writer=True)
    assert place.swap("ref", b"one", expected=None)
    assert not place.swap("ref", b"two", expected=None)
    assert not place.swap("ref", b"two", expected=b"other")
    assert place.swap("ref", b"two", expected=b"one")
    assert place.read("ref") == b"two"


@pytest.mark.parametrize("storage", ["folder", "bucket"])
def test_two_writers_of_one_ref(tmp_path: Path, storage: str, request: pytest.FixtureRequest) -> None:
    """Of sixteen swaps with the same expectation exactly one happens, between places without a common lock."""
    store = request.getfixturevalue("moto_store") if storage == "bucket" else None
    places: list[Place] = [
        BucketPlace(store, "place", only_writer=True) if store else FolderPlace(tmp_path / "place")
        for _ in range(16)
    ]
    places[0].write("ref", b"start")
    together = threading.Barrier(16)

    def race(number: int) -> bool:
        together.wait()
        return places[number].swap("ref", str(number).encode(), expected=b"start")

    with ThreadPoolExecutor(16) as pool:
        won = [number for number, done in enumerate(pool.map(race, range(16))) if done]
    assert len(won) == 1
    assert places[0].read("ref") == str(won[0]).encode()


# --- the folder


def test_the_next_hub_continues_with_the_folder(tmp_path: Path) -> None:
    def hubs() -> int:
        return [thread.name for thread in threading.enumerate()].count("hub")

    others = hubs()  # that serve other tests
    with EmbeddedHub(tmp_path / "hub") as hub, without_xet(hub.endpoint_url):
        api = HfApi(endpoint=hub.endpoint_url, token=False)
        api.create_repo(REPO)
        commit = api.upload_file(repo_id=REPO, path_or_fileobj=b"kept", path_in_repo="a.txt").oid
        with pytest.raises(HubError, match="another hub already serves"):
            EmbeddedHub(tmp_path / "hub").__enter__()
    with EmbeddedHub(tmp_path / "hub") as hub:
        assert HfApi(endpoint=hub.endpoint_url, token=False).repo_info(REPO).sha == commit
        assert raw(hub, "GET", f"/{REPO}/resolve/main/a.txt").read() == b"kept"
        assert hubs() == others + 1


def test_a_taken_port_is_named(hub: EmbeddedHub, tmp_path: Path) -> None:
    port = int(hub.endpoint_url.rpartition(":")[2])
    with pytest.raises(HubError, match=f"{port}.*choose another port"):
        EmbeddedHub(tmp_path / "other", port).__enter__()
