from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from training_ready.storage.client import client_for, make_client
from training_ready.storage.errors import SettingsError
from training_ready.storage.settings import VARIABLES, StorageSettings, read_dotenv

PRECEDENCE = [(name, variables) for name, variables in VARIABLES.items() if len(variables) > 1]


def sample(name: str, variable: str) -> str:
    return (
        f"https://{variable.lower().replace('_', '-')}.example"
        if name == "endpoint_url"
        else f"value-of-{variable}"
    )


@pytest.mark.parametrize(("name", "variables"), PRECEDENCE)
def test_the_first_variable_set_wins(name: str, variables: tuple[str, ...]) -> None:
    for first in range(len(variables)):
        env = {variable: sample(name, variable) for variable in variables[first:]}
        settings = StorageSettings.from_environment(env, dotenv=False)
        assert getattr(settings, name) == sample(name, variables[first])
        assert settings.sources[name] == variables[first]


def test_the_documented_names() -> None:
    assert VARIABLES["access_key_id"] == ("OVH_S3_ACCESS_KEY", "OVH_ACCESS_KEY", "AWS_ACCESS_KEY_ID")
    assert VARIABLES["endpoint_url"] == ("OVH_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    assert VARIABLES["region"] == ("OVH_S3_REGION", "AWS_REGION")


def test_empty_values_count_as_unset_and_defaults_hold() -> None:
    env = {"OVH_S3_ACCESS_KEY": "", "OVH_ACCESS_KEY": "  ", "AWS_ACCESS_KEY_ID": "third", "OVH_S3_BUCKET": ""}
    settings = StorageSettings.from_environment(env, dotenv=False)
    assert settings.access_key_id == "third"
    assert settings.bucket == "pixelated-training-data"
    assert settings.checkpoint_bucket == "pixelated-checkpoints"
    assert settings.root_prefix == ""


def test_overrides_win_but_none_is_no_override() -> None:
    env = {"OVH_S3_BUCKET": "from-env", "OVH_S3_REGION": "gra"}
    settings = StorageSettings.from_environment(env, dotenv=False, bucket="mine", region=None)
    assert (settings.bucket, settings.region) == ("mine", "gra")


@pytest.mark.parametrize("written", ["datasets", "datasets/", "/datasets/", "/datasets"])
def test_the_root_prefix_is_a_folder(written: str) -> None:
    assert StorageSettings(root_prefix=written).root_prefix == "datasets/"


def test_missing_credentials_name_every_variable() -> None:
    settings = StorageSettings.from_environment({"OVH_S3_ACCESS_KEY": "have"}, dotenv=False)
    with pytest.raises(SettingsError) as caught:
        make_client(settings)
    for name in VARIABLES["secret_access_key"]:
        assert name in str(caught.value)
    assert "OVH_ACCESS_KEY" not in str(caught.value)
    assert "have" not in str(caught.value)


def test_ovh_keys_are_never_sent_to_another_provider() -> None:
    env = {"OVH_S3_ACCESS_KEY": "a", "OVH_S3_SECRET_KEY": "b"}
    with pytest.raises(SettingsError, match=r"no endpoint.*OVH_S3_ENDPOINT.*AWS_ENDPOINT_URL_S3"):
        make_client(StorageSettings.from_environment(env, dotenv=False))


def test_a_session_token_stays_with_its_own_key() -> None:
    aws = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "t"}
    assert StorageSettings.from_environment(aws, dotenv=False).session_token == "t"
    assert (
        StorageSettings.from_environment({**aws, "OVH_S3_ACCESS_KEY": "o"}, dotenv=False).session_token
        is None
    )


def test_secrets_are_never_shown() -> None:
    settings = StorageSettings(access_key_id="AKIDKEY", secret_access_key="SECRET", session_token="TOKEN")
    for shown in (repr(settings), str(settings), f"{settings}"):
        assert not any(secret in shown for secret in ("AKIDKEY", "SECRET", "TOKEN"))
    with pytest.raises(SettingsError) as caught:
        StorageSettings(endpoint_url="https://user:hunter2@s3.example")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3.gra.io.cloud.ovh.net", "ftp://x", "https://", "http://host:port"])
def test_an_endpoint_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="is not a URL"):
        StorageSettings(endpoint_url=url)


@pytest.mark.parametrize("bucket", ["s3://data", "data/raw", "", "a"])
def test_a_bucket_that_is_no_name_is_refused(bucket: str) -> None:
    with pytest.raises(SettingsError, match="not a bucket's name"):
        StorageSettings(bucket=bucket)


@pytest.mark.parametrize(
    ("endpoint", "region", "expected"),
    [
        ("https://s3.gra.io.cloud.ovh.net", None, "gra"),
        ("https://s3.us-east-va.io.cloud.ovh.us", None, "us-east-va"),
        ("https://s3.gra.io.cloud.ovh.net", "bhs", "bhs"),
        ("http://127.0.0.1:9000", None, "us-east-1"),
        (None, None, "us-east-1"),
    ],
)
def test_the_signing_region(endpoint: str | None, region: str | None, expected: str) -> None:
    assert StorageSettings(endpoint_url=endpoint, region=region).signing_region == expected


def test_dotenv_of_a_parent_adds_but_does_not_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / ".env").write_text("OVH_S3_BUCKET=from-file\nOVH_S3_REGION=gra\nOVH_S3_ACCESS_KEY=file-key\n")
    monkeypatch.chdir(inner)
    monkeypatch.setenv("OVH_S3_BUCKET", "from-environment")
    monkeypatch.setenv("OVH_S3_ACCESS_KEY", "")
    settings = StorageSettings.from_environment()
    assert settings.bucket == "from-environment"
    assert settings.region == "gra"
    assert settings.access_key_id == "file-key"
    assert StorageSettings.from_environment(dotenv=False).region is None


def test_the_nearest_dotenv_is_the_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / ".env").write_text("A=outer\nB=outer\n")
    (tmp_path / "a" / ".env").write_text("A=inner\n")
    assert read_dotenv(tmp_path / "a") == {"A": "inner"}


def test_what_a_dotenv_may_say(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        '\ufeff# a comment\n\nexport A = plain\nB=\'single # kept\'\nC="double \\"kept\\"" # dropped\n'
        "D=with#hash # comment\nE=\nF=a=b==\n  G=indented  \nH=''\n",
        encoding="utf-8",
    )
    assert read_dotenv(tmp_path) == {
        "A": "plain",
        "B": "single # kept",
        "C": 'double "kept"',
        "D": "with#hash",
        "F": "a=b==",
        "G": "indented",
    }


@pytest.mark.parametrize("line", ["this is no assignment hunter2", "KEY='hunter2"])
def test_a_broken_dotenv_is_named_by_line_and_not_repeated(tmp_path: Path, line: str) -> None:
    (tmp_path / ".env").write_text(f"A=1\n{line}\n")
    with pytest.raises(SettingsError, match=r"\.env:2") as caught:
        read_dotenv(tmp_path)
    assert "hunter2" not in str(caught.value)


def test_importing_reads_nothing_and_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("broken on purpose\n")
    code = (
        "import pkgutil, importlib, sys, training_ready.storage as room\n"
        "for module in pkgutil.iter_modules(room.__path__):\n"
        "    importlib.import_module(f'training_ready.storage.{module.name}')\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_one_client_per_store_whatever_the_bucket(store_server: object) -> None:
    settings = store_server.settings("abc")  # type: ignore[attr-defined]
    assert client_for(settings) is client_for(store_server.settings("other"))  # type: ignore[attr-defined]
    assert client_for(settings) is not client_for(replace(settings, secret_access_key="another"))


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "10.1.2.3", "localhost:9000", "[::1]:9000"])
def test_numbers_and_localhost_are_addressed_by_path(host: str) -> None:
    settings = StorageSettings(endpoint_url=f"http://{host}", access_key_id="a", secret_access_key="b")
    url = make_client(settings).generate_presigned_url("get_object", Params={"Bucket": "bkt", "Key": "k"})
    assert url.startswith(f"http://{host}/bkt/k?")


def test_checksums_only_where_required() -> None:
    config = make_client(StorageSettings(access_key_id="a", secret_access_key="b")).meta.config
    assert config.request_checksum_calculation == "when_required"
    assert config.response_checksum_validation == "when_required"
