"""A release in a bucket or a folder: revisions that never change, and a ref that is written last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from training_ready.release.connection import PublishError
from training_ready.release.publish import publish_release
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

from ..faulty_network import proxy_before
from .conftest import of_another, use
from .test_publish_faults import change


class Target:
    """What tests need to know about a bucket or a folder: its address, and what lies in it."""

    def __init__(self, address: str, store: ObjectStore | None) -> None:
        self.address, self._store = address, store

    def files(self) -> dict[str, bytes]:
        if self._store is None:
            root = Path(self.address)
            paths = [
                path for path in root.rglob("*") if path.is_file() and path.name not in (".writing", ".lock")
            ]
            return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
        prefix = "models/tiny/"
        return {
            item.key.removeprefix(prefix): self._store.get_bytes(item.key)
            for item in self._store.list(prefix)
        }

    def write(self, name: str, data: bytes) -> None:
        if self._store is None:
            (Path(self.address) / name).write_bytes(data)
        else:
            self._store.put_bytes(f"models/tiny/{name}", data)

    def main(self) -> str:
        return str(json.loads(self.files()["refs/main.json"])["revision"])


@pytest.fixture(params=["folder", "bucket"])
def target(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Target]:
    if request.param == "folder":
        yield Target(str(tmp_path / "models" / "tiny"), None)
    else:
        store: ObjectStore = request.getfixturevalue("moto_store")
        use(store, monkeypatch)
        yield Target(f"s3://{store.bucket}/models/tiny", store)


def content(release: Path) -> dict[str, bytes]:
    return {path.relative_to(release).as_posix(): path.read_bytes() for path in release.rglob("*")}


def test_a_revision_holds_the_files_as_they_are_and_never_changes(target: Target, release: Path) -> None:
    first = publish_release(release, target.address)
    assert first.uploaded
    old = content(release)
    files = target.files()
    assert {name for name in files if not name.startswith(f"{first.name}/")} == {"refs/main.json"}
    manifest = json.loads(files[f"{first.name}/manifest.json"])
    assert {file["path"]: file["sha256"] for file in manifest["files"]} == {
        file.path: file.sha256 for file in first.files
    }
    assert not publish_release(release, target.address).uploaded
    assert target.files() == files
    change(release)
    second = publish_release(release, target.address)
    assert second.name != first.name
    assert target.main() == second.name
    files = target.files()
    for name, wanted in ((first.name, old), (second.name, content(release))):
        assert {path: files[f"{name}/{path}"] for path in wanted} == wanted


def test_another_models_release_is_replaced_only_on_purpose(target: Target, release: Path) -> None:
    first = publish_release(release, target.address)
    of_another(release, run="other-run")
    with pytest.raises(
        PublishError, match=r"run 'tiny-run' \(here 'other-run'\).*To continue, run: .* --replace$"
    ):
        publish_release(release, target.address)
    assert target.main() == first.name
    second = publish_release(release, target.address, replace=True)
    assert target.main() == second.name
    target.write("refs/main.json", b'{"revision": "../elsewhere"}')
    with pytest.raises(PublishError, match=r"without a release\.json"):
        publish_release(release, target.address)


def test_an_interruption_leaves_main_where_it_was(target: Target, release: Path) -> None:
    first = publish_release(release, target.address)
    change(release)
    for step in ("upload", "read back", "tag", "main"):

        def interrupt(label: str, done: int, total: int, step: str = step) -> None:
            if label == step:
                raise InterruptedError("cut off")

        with pytest.raises(
            PublishError, match=r"main did not move.*To continue, run: training-ready release"
        ):
            publish_release(release, target.address, progress=interrupt)
        assert target.main() == first.name
    second = publish_release(release, target.address)
    assert target.main() == second.name


def test_a_damaged_file_of_a_revision_is_found_and_sent_again(target: Target, release: Path) -> None:
    first = publish_release(release, target.address)
    weights = (release / "model.safetensors").read_bytes()
    target.write(f"{first.name}/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    assert not publish_release(release, target.address).uploaded
    assert target.files()[f"{first.name}/model.safetensors"] == weights
    manifest = target.files()[f"{first.name}/manifest.json"]
    target.write(f"{first.name}/manifest.json", b"{}")
    with pytest.raises(PublishError, match="another release of the same step"):
        publish_release(release, target.address)
    target.write(f"{first.name}/manifest.json", manifest)
    target.write(f"{first.name}/extra.bin", b"x")
    with pytest.raises(PublishError, match=r"extra\.bin: not part of the release"):
        publish_release(release, target.address)


def test_somebody_else_moves_main_meanwhile(target: Target, release: Path) -> None:
    publish_release(release, target.address)
    change(release)

    def interfere(label: str, done: int, total: int) -> None:
        if label == "main" and done == 0:
            target.write("refs/main.json", b'{"revision": "theirs"}')

    with pytest.raises(PublishError, match="somebody else moved main"):
        publish_release(release, target.address, progress=interfere)
    assert target.main() == "theirs"


@pytest.mark.slow  # the client of the bucket tries five times, with growing pauses
@pytest.mark.parametrize("step", ["upload", "read back", "main"])
def test_a_bucket_that_is_gone_for_a_while(
    moto_store: ObjectStore, release: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    address = f"s3://{moto_store.bucket}/models/tiny"
    with proxy_before(moto_store.settings.endpoint_url or "") as network:
        use(ObjectStore(replace(moto_store.settings, endpoint_url=network.url)), monkeypatch)
        first = publish_release(release, address)
        change(release)

        def go(label: str, done: int, total: int) -> None:
            network.down = network.down or label == step

        said = r"Whether main moved is not known" if step == "main" else r"main did not move"
        with pytest.raises(
            PublishError, match=rf"503.*{said}.*To continue, run: training-ready release publish"
        ):
            publish_release(release, address, progress=go)
        network.down = False
        assert Target(address, moto_store).main() == first.name
        second = publish_release(release, address)
        assert Target(address, moto_store).main() == second.name


def test_a_store_that_ignores_conditions_needs_a_promise(
    store: ObjectStore, store_server: EmbeddedStore, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(store, monkeypatch)
    address = f"s3://{store.bucket}/models/tiny"
    with pytest.raises(PublishError, match=r"does not honour conditional writes.*--only-writer"):
        publish_release(release, address)
    assert list(store.list()) == []
    assert publish_release(release, address, only_writer=True).uploaded
