"""A release arrives whole and proven, or the message says what is where."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from safetensors.numpy import load_file, save_file

from training_ready.release.connection import PUBLIC_HUB, PublishError, is_public_hub, token_for, without_xet
from training_ready.release.contents import ContentsError, release_files
from training_ready.release.facts import CardError
from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_commands import hub_check, hub_serve
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.hub_store import HubStore
from training_ready.release.place_bucket import BucketPlace
from training_ready.release.publish import Publication, publish_release
from training_ready.storage.objects import ObjectStore

from .conftest import of_another

REPO = "me/tiny"


def publish(hub: EmbeddedHub, release: Path, **options: object) -> Publication:
    return publish_release(release, REPO, endpoint=hub.endpoint_url, **options)  # type: ignore[arg-type]


def blob(hub: EmbeddedHub, path: Path) -> Path:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return hub.root / "blobs" / sha256[:2] / sha256


def test_a_release_is_proven_on_its_branch_before_main_moves(
    hub: EmbeddedHub, api: HfApi, release: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    mains: dict[str, str | None] = {}

    def watch(label: str, done: int, total: int) -> None:
        seen.append((label, done, total))
        if label != "hash" and label not in mains:
            mains[label] = api.repo_info(REPO).sha

    publication = publish(hub, release, progress=watch)
    assert publication.uploaded
    assert publication.url == f"{hub.endpoint_url}/{REPO}"
    assert list(dict.fromkeys(label for label, _, _ in seen)) == [
        "hash", "upload", "commit", "read back", "tag", "main",
    ]  # fmt: skip
    assert len(set(mains.values())) == 1, "main moved before the end"
    refs = api.list_repo_refs(REPO)
    branches = {branch.name: branch.target_commit for branch in refs.branches}
    assert branches["main"] == publication.revision != mains["main"]
    assert set(branches) == {"main", "step-004321"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [
        (publication.name, branches["step-004321"])
    ]
    assert re.fullmatch(r"step-004321-[0-9a-f]{8}", publication.name)
    for revision in branches:
        commits = api.list_repo_commits(REPO, revision=revision)
        assert len(commits) == 2, "creation, and one commit of ours"
    listed = [
        {
            entry.path: (entry.size, entry.blob_id, entry.lfs and entry.lfs.sha256)
            for entry in api.list_repo_tree(REPO, recursive=True, revision=revision)
        }
        for revision in ("main", "step-004321")
    ]
    assert listed[0] == listed[1]
    assert {file.path: file.sha256 for file in publication.files} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in release.iterdir()
    }
    assert api.repo_info(REPO).private is True
    total = sum(path.stat().st_size for path in release.iterdir())
    for label in ("hash", "upload", "read back"):
        steps = [(done, of) for name, done, of in seen if name == label]
        assert steps == sorted(steps)
        assert steps[-1] == (total, total)


def test_publishing_again_makes_no_commit(hub: EmbeddedHub, api: HfApi, release: Path) -> None:
    first = publish(hub, release)
    second = publish(hub, release)
    assert not second.uploaded
    assert second.revision == first.revision
    assert len(api.list_repo_commits(REPO)) == 2


def test_what_a_killed_publication_was_writing_is_in_nobodys_way(
    hub: EmbeddedHub, api: HfApi, release: Path
) -> None:
    for name in (".README.md.tmp", ".release.json.tmp", ".verified-tgi.json.tmp"):
        (release / name).write_text("half", encoding="utf-8")
    publish(hub, release)
    assert not [path for path in api.list_repo_files(REPO) if path.endswith(".tmp")]


def test_the_next_release_replaces_the_files_of_the_last(hub: EmbeddedHub, api: HfApi, release: Path) -> None:
    weights = load_file(release / "model.safetensors")
    for number, key in enumerate(sorted(weights)):
        save_file({key: weights[key]}, release / f"model-{number}.safetensors")
    (release / "model.safetensors").unlink()
    first = publish(hub, release)
    save_file(weights, release / "model.safetensors")
    for number in range(2):
        (release / f"model-{number}.safetensors").unlink()
    second = publish(hub, release)
    assert sorted(api.list_repo_files(REPO)) == sorted(path.name for path in release.iterdir())
    assert "model-0.safetensors" in api.list_repo_files(REPO, revision=first.revision)
    assert second.uploaded


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"run": "other-run"}, r"run 'tiny-run' \(here 'other-run'\)"),
        ({"base_model": "you/large"}, r"base .* \(here 'you/large'\)"),
    ],
)
def test_another_models_release_is_replaced_only_on_purpose(
    hub: EmbeddedHub, api: HfApi, release: Path, other: dict[str, object], said: str
) -> None:
    first = publish(hub, release)
    of_another(release, **other)
    with pytest.raises(PublishError, match=rf"another model: {said}.*To continue, run: .* --replace$"):
        publish(hub, release)
    assert [branch.name for branch in api.list_repo_refs(REPO).branches] == ["main", "step-004321"]
    assert api.repo_info(REPO).sha == first.revision
    assert publish(hub, release, replace=True).uploaded
    assert not publish(hub, release).uploaded


@pytest.mark.parametrize("name", ["model.safetensors", "release.json"])
def test_what_is_no_release_is_replaced_only_on_purpose(
    hub: EmbeddedHub, api: HfApi, release: Path, name: str
) -> None:
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"by somebody", path_in_repo=name)
    with pytest.raises(PublishError, match=r"1 files? without a release\.json that can be read"):
        publish(hub, release)
    assert api.list_repo_files(REPO) == [name]
    assert publish(hub, release, replace=True).uploaded


# --- what must not leave


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "weights.pt",
        "training_args.bin",
        "optimizer.safetensors",
        "scheduler.pt",
        "rng_state_0.pth",
        "adapter_model.safetensors",
        "adapter_config.json",
        "consolidated.safetensors",
        "training_state.safetensors",
        "trainer_state.json",
        "modeling_tiny.py",
        ".env",
        "arrays.npz",
        "notes.docx",
        "checkpoint-3/optimizer.pt",
    ],
)
def test_a_file_that_must_not_leave_is_named(hub: EmbeddedHub, api: HfApi, release: Path, name: str) -> None:
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).write_bytes(b"x")
    with pytest.raises(ContentsError, match=name.replace(".", r"\.")):
        publish(hub, release)
    assert not api.repo_exists(REPO)


def test_a_pickle_under_a_harmless_name_is_refused(release: Path) -> None:
    import pickle

    (release / "vocab.txt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ContentsError, match=r"vocab\.txt: a pickle"):
        release_files(release)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_missing_file_is_named(hub: EmbeddedHub, release: Path, name: str) -> None:
    (release / name).unlink()
    with pytest.raises(ContentsError, match=f"{name.replace('model.', '*.')}: missing".replace("*", r"\*")):
        publish(hub, release)


def test_damaged_weights_are_refused(release: Path) -> None:
    weights = release / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ContentsError, match="damaged or cut short"):
        release_files(release)
    weights.write_bytes(whole)
    save_file(load_file(weights), release / "copy.safetensors")
    with pytest.raises(ContentsError, match=r"tensor embed\.weight is also in copy\.safetensors"):
        release_files(release)


def test_a_link_out_of_the_folder_is_refused(release: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (release / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (release / "more").symlink_to(tmp_path)
    with pytest.raises(ContentsError) as refused:
        release_files(release)
    assert "notes.txt: a symbolic link" in str(refused.value)
    assert "more: a symbolic link" in str(refused.value)


def test_a_release_whose_card_lacks_a_field_is_refused_by_name(
    hub: EmbeddedHub, api: HfApi, release: Path
) -> None:
    record = json.loads((release / "release.json").read_bytes())
    for group, field in (("words", "limits"), ("facts", "hardware"), ("facts", "wall_seconds")):
        broken = copy.deepcopy(record)
        del broken[group][field]
        (release / "release.json").write_text(json.dumps(broken))
        with pytest.raises(CardError, match=rf"{group}\.{field}: Field required"):
            publish(hub, release)
    (release / "release.json").unlink()
    with pytest.raises(CardError, match=r"release\.json is missing"):
        publish(hub, release)
    assert not api.repo_exists(REPO)


def test_a_card_that_was_edited_is_written_again(hub: EmbeddedHub, api: HfApi, release: Path) -> None:
    written = (release / "README.md").read_text()
    (release / "README.md").write_text("---\nlicense: mit\n---\nThe best model in the world.\n")
    publish(hub, release)
    assert (release / "README.md").read_text() == written


# --- what can go wrong on the way


def test_a_content_damaged_on_the_hubs_disk_is_found(hub: EmbeddedHub, release: Path) -> None:
    publish(hub, release)
    stored = blob(hub, release / "model.safetensors")
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(PublishError, match=r"model\.safetensors: sent .* the hub returns") as refused:
        publish(hub, release)
    assert "hub check" in str(refused.value)
    assert "config.json" not in str(refused.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_content_is_set_aside_and_published_again(tmp_path: Path, release: Path, name: str) -> None:
    root = tmp_path / "hub"
    with EmbeddedHub(root) as hub:
        first = publish(hub, release)
        blob(hub, release / name).write_bytes(b"rubbish")
    with pytest.raises(HubError, match=f"1 damaged contents(.|\n)*{REPO}"):
        hub_check(root)
    with EmbeddedHub(root) as hub:
        again = publish(hub, release)
        assert again.revision == first.revision
    hub_check(root)


def test_unreferenced_contents_are_deleted_only_when_asked(
    tmp_path: Path, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "hub"
    with EmbeddedHub(root) as hub:
        publish(hub, release)
        HfApi(endpoint=hub.endpoint_url, token=False).delete_repo(REPO)
        weights = blob(hub, release / "model.safetensors")
    hub_check(root)
    assert weights.exists()
    hub_check(root, delete_unreferenced=True)
    assert not weights.exists()
    total = sum(path.stat().st_size for path in release.iterdir())
    assert f"deleted {total} bytes" in capsys.readouterr().out


def test_nothing_is_deleted_from_a_bucket_that_another_hub_may_serve(moto_store: ObjectStore) -> None:
    with HubStore(BucketPlace(moto_store, "hub")) as store:
        on_its_way = store.blobs.put(b"its commit is on the way")
        with pytest.raises(HubError, match=r"has no lock.*--only-writer"):
            store.delete_unreferenced()
        assert store.blobs.size(on_its_way) == 24
    with HubStore(BucketPlace(moto_store, "hub", only_writer=True)) as store:
        assert store.delete_unreferenced() == 24
        assert store.blobs.size(on_its_way) is None


def test_an_address_that_holds_a_password_is_refused_and_not_shown(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:topsecret@hub.example:9800/")
    for given in (None, "http://topsecret@hub.example:9800"):
        with pytest.raises(PublishError, match=r"http://…@hub\.example:9800.*HF_TOKEN") as refused:
            publish_release(release, REPO, endpoint=given)
        assert "topsecret" not in str(refused.value)


def test_a_wrong_token_is_refused_in_one_sentence(tmp_path: Path, release: Path) -> None:
    with EmbeddedHub(tmp_path / "hub", token="right") as hub:
        for token in ("not-the-one", None):
            with pytest.raises(PublishError, match=r"HTTP 401.*Set HF_TOKEN") as refused:
                publish(hub, release, token=token)
            assert "not-the-one" not in str(refused.value)
        assert publish(hub, release, token="right").uploaded


def test_the_login_of_the_public_hub_is_not_sent_elsewhere(
    tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that accepts exactly the machine's login must still refuse a publication that names no token."""
    monkeypatch.setenv("HF_TOKEN", "hf_login_of_this_machine")
    with (
        EmbeddedHub(tmp_path / "hub", token="hf_login_of_this_machine") as hub,
        pytest.raises(PublishError, match="401"),
    ):
        publish(hub, release)


def test_no_hub_at_the_endpoint(release: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    with pytest.raises(
        PublishError, match=rf"no hub answers at http://127\.0\.0\.1:{free}.*release publish"
    ) as refused:
        publish_release(release, REPO, endpoint=f"http://127.0.0.1:{free}")
    assert str(release) in str(refused.value)


def test_a_repository_name_that_is_none_is_refused(hub: EmbeddedHub, release: Path) -> None:
    with pytest.raises(PublishError, match="Repo id must"):
        publish_release(release, "a/b/c", endpoint=hub.endpoint_url)


def test_main_moved_by_somebody_else_meanwhile(hub: EmbeddedHub, api: HfApi, release: Path) -> None:
    publish(hub, release)
    save_file({"w": load_file(release / "model.safetensors")["embed.weight"]}, release / "model.safetensors")

    def interfere(label: str, done: int, total: int) -> None:
        if label == "tag":
            api.upload_file(repo_id=REPO, path_or_fileobj=b"other", path_in_repo="other.txt")

    with pytest.raises(PublishError, match=r"somebody else moved main.*To continue, run: .*release publish"):
        publish(hub, release, progress=interfere)
    assert "other.txt" in api.list_repo_files(REPO)
    assert publish(hub, release).uploaded
    assert "other.txt" not in api.list_repo_files(REPO)


# --- Xet


def test_xet_is_off_for_self_hosted_hubs_only(
    hub: EmbeddedHub, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert publish(hub, release).uploaded
    assert constants.HF_HUB_DISABLE_XET is False
    with without_xet("https://huggingface.co"):
        assert constants.HF_HUB_DISABLE_XET is False
    assert is_public_hub("https://huggingface.co")
    assert not is_public_hub("https://huggingface.co.example.org")


# --- the command


def test_the_publish_command_prints_what_is_proven(hub: EmbeddedHub, release: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from training_ready.release.commands import release_publish; "
        "release_publish(Path(sys.argv[1]), sys.argv[2], sys.argv[3])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(release), REPO, hub.endpoint_url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    size = sum(path.stat().st_size for path in release.iterdir())
    assert f"pushed and read back, {len(list(release.iterdir()))} files, {size:,} bytes" in done.stdout


def test_a_hub_for_others_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAINING_READY_HUB_TOKEN", raising=False)
    with pytest.raises(HubError, match="TRAINING_READY_HUB_TOKEN"):
        hub_serve(tmp_path / "hub", host="0.0.0.0", port=0)


def test_the_token_of_a_hub_of_ones_own_never_goes_to_the_public_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINING_READY_HUB_TOKEN", "own")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert token_for("http://127.0.0.1:9800") == "own"
    assert token_for(PUBLIC_HUB) is None
    monkeypatch.setenv("HF_TOKEN", "given")
    assert token_for("http://127.0.0.1:9800") == token_for(PUBLIC_HUB) == "given"
