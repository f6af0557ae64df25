"""A recipe becomes a job that the platform reads, or a list of everything that is wrong with it."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from training_ready.platforms.ovh import (
    FLAVORS,
    MOST_GPUS,
    MOST_SECONDS,
    PlatformError,
    command_line,
    endpoint,
    job_spec,
    render,
    schema_faults,
)
from training_ready.recipe.recipe import Recipe

Load = Callable[..., Recipe]

GOLDEN = """\
# OVHcloud AI Training JobSpec: POST as JSON to https://gra.training.ai.cloud.ovh.net/v1/job
# Storage and hub credentials are not part of a job: see docs/launch.md.
image: registry.gra.example/people/training-ready:1.2
name: training-ready-two
command:
- accelerate
- launch
- --config_file
- accelerate_configs/ddp.yaml
- --num_processes
- '2'
- scripts/run_sft.py
- recipes/two.yaml
- learning_rate=5e-5
resources:
  gpu: 2
  flavor: l40s-1-gpu
envVars:
- name: HF_HOME
  value: /workspace/.hf
- name: GREETING
  value: it's quoted
volumes:
- dataStore:
    alias: S3GRA
    container: shared-models
    prefix: mixtral/step-123
  mountPath: /models
  permission: RO
  cache: true
- dataStore:
    alias: S3GRA
    container: runs
  mountPath: /workspace/training-ready/runs
  permission: RW
  cache: false
timeout: 21600
timeoutAutoRestart: false
unsecureHttp: false
labels:
  training-ready: 0.1.0
  recipe: two
# The same job, logged in to GRA:
# ovhai job run --name training-ready-two --gpu 2 --flavor l40s-1-gpu --timeout 21600s \
--label training-ready=0.1.0 --label recipe=two --env HF_HOME=/workspace/.hf --env 'GREETING=it'"'"'s quoted' \
--volume shared-models@S3GRA/mixtral/step-123:/models:ro:cache \
--volume runs@S3GRA/:/workspace/training-ready/runs:rw:no-cache registry.gra.example/people/training-ready:1.2 \
-- accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/run_sft.py recipes/two.yaml \
learning_rate=5e-5
"""


def test_the_rendered_job_is_the_golden_one(recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_ready.platforms.ovh.__version__", "0.1.0")
    overrides = ["learning_rate=5e-5"]
    text = render(recipe(*overrides), overrides)
    stand_in = [line for line in text.splitlines() if "stand-in" in line or "launch.ovh.image=" in line]
    assert len(stand_in) == 2  # .example is reserved too: the reader is told that the image is not real
    assert "\n".join(line for line in text.splitlines() if line not in stand_in) + "\n" == GOLDEN
    assert yaml.safe_load(text) == job_spec(recipe(*overrides), overrides)


def test_a_real_image_brings_no_note(recipe: Load) -> None:
    assert "stand-in" not in render(recipe("launch.ovh.image=registry.gra.cloud/people/training-ready:1.2"))


def test_the_command_line_says_what_the_spec_says(recipe: Load) -> None:
    spec = job_spec(recipe(), ["release.summary=two words; $(and) `more`"])
    words = shlex.split(command_line(spec))
    before, after = words[: words.index("--")], words[words.index("--") + 1 :]
    assert before[:3] == ["ovhai", "job", "run"]
    assert before[-1] == spec["image"]
    assert after == spec["command"]
    flags: dict[str, list[str]] = {}
    for flag, value in zip(before[3:-1:2], before[4:-1:2], strict=True):
        flags.setdefault(flag, []).append(value)
    assert flags["--env"] == [f"{one['name']}={one['value']}" for one in spec["envVars"]]
    assert flags["--gpu"] == ["2"]
    assert flags["--timeout"] == ["21600s"]
    assert set(flags) == {"--name", "--gpu", "--flavor", "--timeout", "--label", "--env", "--volume"}


def test_volumes_of_public_repositories(recipe: Load) -> None:
    spec = job_spec(recipe("launch.ovh.volumes=['https://github.com/a/b.git:/code:ro']"))
    assert spec["volumes"] == [
        {
            "publicGit": {"url": "https://github.com/a/b.git"},
            "mountPath": "/code",
            "permission": "RO",
            "cache": False,
        }
    ]
    assert "--volume https://github.com/a/b.git:/code:ro:no-cache" in command_line(spec)


def test_without_a_timeout_the_platform_ends_the_job_after_seven_days(recipe: Load) -> None:
    assert job_spec(recipe("launch.ovh.timeout_hours=null"))["timeout"] == 7 * 24 * 60 * 60


def test_the_endpoint_is_the_regions() -> None:
    assert endpoint("BHS") == "https://bhs.training.ai.cloud.ovh.net/v1/job"


# --------------------------------------------------------------------------- what is refused, and in which words
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launch.ovh.flavor=gpu_nvidia_l40s_1"], ["gpu_nvidia_l40s_1", "l40s-1-gpu"]),
        (["launch.ovh.flavor=ai1-1-cpu"], ["ai1-1-cpu", "no GPU flavor"]),
        (["launch.ovh.region=US-EAST-VA"], ["US-EAST-VA", "GRA and BHS"]),
        (["launch.ovh.gpus=8", "launch.num_processes=8"], ["8 x l40s-1-gpu", "4 more than the 4"]),
        (
            ["launch.ovh.flavor=a100-1-gpu", "launch.ovh.gpus=3", "launch.num_processes=3"],
            ["3 x a100-1-gpu", "1 more than the 2"],
        ),
        (["launch.ovh.timeout_hours=200"], ["200 h = 720,000 s", "604,800 s", "168 h"]),
        (["launch.ovh.timeout_hours=0.0001", "budget.max_hours=null"], ["0.0001 h = 0 s", "1 to 604,800 s"]),
        (["launch.ovh.timeout_hours=null", "budget.max_hours=200"], ["budget.max_hours: 200 h", "168 h"]),
        (["launch.accelerate_config=single_gpu"], ["uses 1 GPU; the other 1 would be paid"]),
        (["launch.accelerate_config=cpu"], ["trains on the processor", "paid and idle"]),
        (["launch.accelerate_config=null"], ["accelerate_config is not set"]),
        (["launch.accelerate_config=zero9"], ["accelerate_configs/zero9.yaml"]),
        (["launch.accelerate_config=/etc/hosts.yaml"], ["/etc/hosts.yaml", "outside"]),
        (["launch.ovh.flavor=ai1-1-gpu"], ["V100S", "no bf16"]),
        (["launch.ovh.image=registry.gra.cloud/training-ready"], ["$.image", "does not match"]),
        (["launch.ovh.volumes=['bucket:/data']"], ["bucket:/data", "container@alias/prefix"]),
        (["launch.ovh.volumes=['b@S3GRA:/data/../etc:rw']"], ["$.volumes[0].mountPath"]),
        (["launch.ovh.env.BAD-NAME=x"], ["BAD-NAME"]),
        (['launch.ovh.env.TWO_LINES="a\\nb"'], ["line break"]),
    ],
)
def test_a_job_that_cannot_run_is_refused(recipe: Load, overrides: list[str], said: list[str]) -> None:
    loaded = recipe(*overrides)
    with pytest.raises(PlatformError) as refusal:
        job_spec(loaded)
    assert [word for word in said if word not in str(refusal.value)] == []


def test_every_fault_is_reported_at_once(recipe: Load) -> None:
    loaded = recipe(
        "launch.ovh.flavor=x", "launch.ovh.region=RBX", "launch.ovh.timeout_hours=999", "launch.ovh.image=x"
    )
    with pytest.raises(PlatformError) as refusal:
        job_spec(loaded)
    lines = str(refusal.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "launch.ovh.region",
        "launch.ovh.flavor",
        "launch.ovh.timeout_hours",
        "$.image",
    ]


def test_a_recipe_without_a_job_is_told_how_to_get_one(recipe: Load) -> None:
    with pytest.raises(PlatformError, match=r"no launch\.ovh section"):
        job_spec(recipe("launch.ovh=null"))


def test_a_recipe_outside_the_checkout_is_refused(recipe: Load, tmp_path: Path) -> None:
    loaded = replace(recipe(), path=Path("/home/someone/recipes/mine.yaml"))
    with pytest.raises(PlatformError, match="the image holds the checkout only"):
        job_spec(loaded)


# --------------------------------------------------------------------------- secrets
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "anything"),
        ("OVH_S3_SECRET_ACCESS_KEY", "anything"),
        ("AWS_ACCESS_KEY_ID", "anything"),
        ("WANDB_API_KEY", "anything"),
        ("HARMLESS", "hf_" + "a" * 34),
        ("HARMLESS", "AKIA" + "A" * 16),
        ("HARMLESS", "0123456789abcdef" * 2),
        ("STORE", "https://me:word@s3.gra.io.cloud.ovh.net"),
    ],
)
def test_no_secret_enters_a_job_and_no_message_repeats_one(recipe: Load, name: str, value: str) -> None:
    loaded = recipe()
    ovh = loaded.launch.ovh
    assert ovh is not None
    launch = loaded.launch.model_copy(update={"ovh": ovh.model_copy(update={"env": {name: value}})})
    with pytest.raises(PlatformError) as refusal:
        job_spec(replace(loaded, launch=launch))
    assert "secret" in str(refusal.value) or "looks like" in str(refusal.value)
    assert value == "anything" or value not in str(refusal.value)


def test_no_secret_enters_through_the_command(recipe: Load) -> None:
    with pytest.raises(PlatformError, match=r"command\[\d+\] looks like a Hugging Face token"):
        job_spec(recipe(), ["run_name=hf_" + "a" * 34])


def test_names_that_only_sound_like_secrets_pass(recipe: Load) -> None:
    overrides = [
        "launch.ovh.env.TOKENIZERS_PARALLELISM='false'",
        "launch.ovh.env.HF_TOKEN_PATH=/workspace/secrets/hf_token",
        "launch.ovh.env.COMMIT=" + "0a" * 20,
    ]
    names = {one["name"] for one in job_spec(recipe(*overrides))["envVars"]}
    assert {"TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "COMMIT"} <= names


# --------------------------------------------------------------------------- the schema by itself
def schema() -> dict[str, Any]:
    text = (
        resources.files("training_ready.platforms")
        .joinpath("ovh_job.schema.json")
        .read_text(encoding="utf-8")
    )
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def test_the_schema_is_a_schema_and_agrees_with_the_tables() -> None:
    Draft202012Validator.check_schema(schema())
    parts = schema()["properties"]
    assert parts["resources"]["properties"]["flavor"]["enum"] == list(FLAVORS)
    assert parts["resources"]["properties"]["gpu"]["maximum"] == MOST_GPUS
    assert parts["timeout"]["maximum"] == MOST_SECONDS


def as_kubernetes(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}


def with_value_from(spec: dict[str, Any]) -> dict[str, Any]:
    reference = {"secretKeyRef": {"name": "s3", "key": "secret"}}
    return {**spec, "envVars": [{"name": "STORE", "valueFrom": reference}]}


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (as_kubernetes, "'apiVersion', 'kind', 'metadata', 'spec' were unexpected"),
        (with_value_from, "'valueFrom' was unexpected"),
        (lambda spec: {**spec, "env": [{"name": "A", "value": "b"}]}, "'env' was unexpected"),
        (lambda spec: {**spec, "resources": {"gpu": 1, "flavor": "gpu_nvidia_l40s_1"}}, "gpu_nvidia_l40s_1"),
        (
            lambda spec: {**spec, "resources": {"gpu": 8, "flavor": "h100-1-gpu"}},
            "8 is greater than the maximum of 4",
        ),
        (lambda spec: {**spec, "region": "US-EAST-VA"}, "'region' was unexpected"),
        (lambda spec: {**spec, "envVars": [{"name": "HF_TOKEN", "value": "x"}]}, "$.envVars[0].name"),
        (lambda spec: {**spec, "envVars": [{"name": "s3_secret", "value": "x"}]}, "$.envVars[0].name"),
        (lambda spec: {**spec, "timeout": "12h"}, "'12h' is not of type 'integer'"),
        (lambda spec: {**spec, "unsecureHttp": True}, "$.unsecureHttp"),
        (lambda spec: {**spec, "labels": {"ovh/id": "1"}}, "ovh/id"),
        (lambda spec: {**spec, "sshPublicKeys": ["~/.ssh/id_ed25519.pub"]}, "$.sshPublicKeys[0]"),
        (lambda spec: {**spec, "command": "accelerate launch x"}, "is not of type 'array'"),
        (
            lambda spec: {**spec, "volumes": [{"mountPath": "/a", "permission": "RW", "cache": False}]},
            "$.volumes[0]",
        ),
    ],
)
def test_the_schema_refuses_what_earlier_job_files_got_wrong(
    recipe: Load, mistake: Callable[[dict[str, Any]], dict[str, Any]], said: str
) -> None:
    right = job_spec(recipe())
    assert schema_faults(right) == []
    assert said in "\n".join(schema_faults(mistake(copy.deepcopy(right))))


def test_the_schema_takes_a_public_key(recipe: Load) -> None:
    assert (
        schema_faults({**job_spec(recipe()), "sshPublicKeys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 me@here"]})
        == []
    )
