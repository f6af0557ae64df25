"""The bucket of checkpoints: which right is missing, found before the first checkpoint is due."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from training_ready.check.run import PROBES, Report
from training_ready.storage.objects import ObjectStore

from ..storage.test_objects import enforce, restricted

Check = Callable[..., Report]
Keys = dict[str, str | None]


def mirrored(place: str) -> Keys:
    lines = (Path(__file__).parent / "recipes" / "lora.yaml").read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines) | {"checkpoint": f"{{mirror: '{place}'}}"}


def examined(check: Check, keys: Keys) -> Report:
    return check(keys, skip=[probe for probe in PROBES if probe not in ("keys", "bucket")])


@pytest.mark.parametrize(
    ("rights", "missing", "action"),
    [
        (["s3:ListBucket", "s3:GetObject"], "write", "s3:PutObject"),
        (["s3:ListBucket", "s3:GetObject", "s3:PutObject"], "delete", "s3:DeleteObject"),
        (["s3:GetObject", "s3:PutObject", "s3:DeleteObject"], "list", "s3:ListBucket"),
    ],
)
def test_the_missing_right_is_named(
    check: Check,
    moto_url: str,
    moto_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    rights: list[str],
    missing: str,
    action: str,
) -> None:
    user = restricted(moto_url, moto_store.bucket, rights)
    for name, value in {
        "ENDPOINT": moto_url,
        "ACCESS_KEY": user.access_key_id,
        "SECRET_KEY": user.secret_access_key,
        "BUCKET": moto_store.bucket,
    }.items():
        monkeypatch.setenv(f"OVH_S3_{name}", str(value))
    keys = mirrored(f"s3://{moto_store.bucket}/runs")
    enforce(moto_url, after=0)
    try:
        report = examined(check, keys)
    finally:
        enforce(moto_url, after=10**9)
    found = [finding for _, finding in report.failures if finding.key == "checkpoint.mirror"]
    assert [finding.measured["step"] for finding in found] == [missing]
    assert action in found[0].message
    assert found[0].where == f"recipe.yaml:{len(keys)}"
    assert "no permission or no way to" in found[0].message


def test_a_bucket_that_takes_checkpoints_is_proven_and_left_as_it_was(
    check: Check, bucket: ObjectStore
) -> None:
    before = [info.key for info in bucket.list()]
    report = examined(check, mirrored(f"s3://{bucket.bucket}/runs"))
    assert report.failures == []
    said = [finding.message for finding in report.outcomes[PROBES.index("bucket")].findings]
    assert any(f"s3://{bucket.bucket}/runs/lora/" in message and "proven" in message for message in said)
    assert [info.key for info in bucket.list()] == before
