"""One recipe as one job on OVHcloud AI Training: the API's JobSpec, and the same job as an ``ovhai job run`` line.

``ovhai`` reads no specification file; its YAML is output only. What the platform accepts is the REST body, so that is
what is rendered, checked against ``ovh_job.schema.json``, and translated to the command line.
Sources: https://github.com/ovh/ovhai-python-sdk (JobSpec) and the guide "CLI - Launch an AI Training job".
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from training_ready import TrainingReadyError, __version__
from training_ready.recipe.confidential import is_secret_name, secret_in
from training_ready.recipe.recipe import Recipe
from training_ready.recipe.sections import OvhSection

REGIONS = ("GRA", "BHS")
MOST_GPUS = 4
MOST_SECONDS = 7 * 24 * 3600
"""The platform ends every job after seven days; this is also its default."""
SCRIPT = "scripts/run_sft.py"

_VOLUME = re.compile(
    r"(?:(?P<url>https://[^@\s]+?)|(?P<container>[^@/:\s]+)@(?P<alias>[^@/:\s]+)(?:/(?P<prefix>[^:\s]*))?)"
    r":(?P<mount>/[^:\s]+)(?::(?P<permission>ro|rw|rwd))?(?::(?P<cache>cache|no-cache))?",
    re.IGNORECASE,
)
_OVH_KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_STAND_IN = re.compile(r"^([\w-]+\.)*example(\.(com|org|net))?(:\d+)?/", re.IGNORECASE)


class PlatformError(TrainingReadyError):
    """A job that the platform would refuse, or that would cost money without training. Lists every fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flavor:
    """A GPU machine of AI Training, as ``ovhai capabilities flavor list`` names it."""

    card: str
    bf16: bool = True
    most_gpus: int = MOST_GPUS


FLAVORS: Mapping[str, Flavor] = {
    "ai1-1-gpu": Flavor(card="V100S", bf16=False),
    "ai1-le-1-gpu": Flavor(card="V100S", bf16=False),
    "a10-1-gpu": Flavor(card="A10"),
    "l4-1-gpu": Flavor(card="L4"),
    "l40s-1-gpu": Flavor(card="L40S"),
    "a100-1-gpu": Flavor(card="A100", most_gpus=2),
    "h100-1-gpu": Flavor(card="H100"),
}


def job_spec(recipe: Recipe, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The JobSpec of a recipe; ``overrides`` are repeated in the job's command.

    Raises ``PlatformError`` with every fault: limits, unknown names, secrets, GPUs that would be idle. Pairs of keys
    that contradict each other (processes and GPUs, budget and timeout) are refused when the recipe is read.
    """
    ovh = recipe.launch.ovh
    if ovh is None:
        raise PlatformError(
            f"{recipe.path}: no launch.ovh section, so there is no job to render. Add one:\n"
            "launch:\n  accelerate_config: single_gpu\n"
            "  ovh: {image: REGISTRY/NAME:TAG, flavor: h100-1-gpu, gpus: 1, region: GRA, timeout_hours: 12}"
        )
    faults = [*_machine_faults(recipe, ovh), *_time_faults(recipe, ovh), *_topology_faults(recipe, ovh)]
    volumes = [_volume(text, faults) for text in ovh.volumes]
    spec = {
        "image": ovh.image,
        "name": _job_name(recipe.name),
        "command": _command(recipe, ovh, overrides, faults),
        "resources": {"gpu": ovh.gpus, "flavor": ovh.flavor},
        "envVars": [{"name": name, "value": value} for name, value in ovh.env.items()],
        "volumes": [volume for volume in volumes if volume],
        "timeout": _seconds(ovh),
        "timeoutAutoRestart": False,
        "unsecureHttp": False,
        "labels": {"training-ready": __version__, "recipe": recipe.path.stem},
    }
    faults += _text_faults(spec)
    told = (
        ("$.resources", "$.timeout", "$.envVars") if faults else ()
    )  # places that the lines above explain better
    faults += [fault for fault in schema_faults(spec) if not fault.startswith(told)]
    if faults:
        lines = [f"{recipe.path}: not a job for OVHcloud:", *(f"  {fault}" for fault in faults)]
        raise PlatformError("\n".join(lines))
    return spec


def schema_faults(spec: Mapping[str, Any]) -> list[str]:
    """Where ``spec`` departs from ``ovh_job.schema.json``, one line each; empty if it does not."""
    from jsonschema import Draft202012Validator

    text = resources.files(__package__).joinpath("ovh_job.schema.json").read_text(encoding="utf-8")
    errors = Draft202012Validator(json.loads(text)).iter_errors(spec)
    return sorted(f"{error.json_path}: {error.message}" for error in errors)


def endpoint(region: str) -> str:
    """The URL that takes the JobSpec as JSON, with a Bearer token."""
    return f"https://{region.lower()}.training.ai.cloud.ovh.net/v1/job"


def command_line(spec: Mapping[str, Any]) -> str:
    """The ``ovhai job run`` line of a JobSpec, quoted for a POSIX shell."""
    words = ["ovhai", "job", "run", "--name", spec["name"]]
    words += ["--gpu", str(spec["resources"]["gpu"]), "--flavor", spec["resources"]["flavor"]]
    words += ["--timeout", f"{spec['timeout']}s"]
    for name, value in spec["labels"].items():
        words += ["--label", f"{name}={value}"]
    for variable in spec["envVars"]:
        words += ["--env", f"{variable['name']}={variable['value']}"]
    for volume in spec["volumes"]:
        words += ["--volume", _volume_text(volume)]
    return shlex.join([*words, spec["image"], "--", *spec["command"]])


def render(recipe: Recipe, overrides: Sequence[str] = ()) -> str:
    """The JobSpec as YAML, with the command line and what is still missing as comments around it."""
    spec = job_spec(recipe, overrides)
    region = recipe.launch.ovh.region if recipe.launch.ovh else ""
    head = [f"# OVHcloud AI Training JobSpec: POST as JSON to {endpoint(region)}"]
    if _STAND_IN.match(spec["image"]):
        head.append(
            "# The image is a stand-in (example.com is reserved): build and push your own, then set it here or"
        )
        head.append("# by launch.ovh.image=REGISTRY/NAME:TAG on the command line.")
    head.append("# Storage and hub credentials are not part of a job: see docs/launch.md.")
    body = yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=110)
    tail = [f"# The same job, logged in to {region}:", "# " + command_line(spec)]
    return "\n".join([*head, body.rstrip(), *tail, ""])


# --------------------------------------------------------------------------- parts of the job
def _command(recipe: Recipe, ovh: OvhSection, overrides: Sequence[str], faults: list[str]) -> list[str]:
    words = ["accelerate", "launch"]
    if recipe.launch.accelerate_config:
        path = _topology(recipe.launch.accelerate_config)
        words += ["--config_file", _inside(path, "launch.accelerate_config", faults)]
    words += ["--num_processes", str(ovh.gpus), SCRIPT, _inside(recipe.path, "the recipe", faults)]
    return [*words, *overrides]


def _topology(name: str) -> Path:
    """The file of an accelerate topology: a path stays one, a name is a shipped file."""
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    return Path(name) if is_path else Path("accelerate_configs", f"{name}.yaml")


def _inside(path: Path, what: str, faults: list[str]) -> str:
    """The path as the image sees it: relative to the checkout, which is its working directory."""
    try:
        return path.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        faults.append(
            f"{what} {path} lies outside {Path.cwd()}; the image holds the checkout only: move it there"
        )
        return path.as_posix()


def _job_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"training-ready-{name}".lower())[:63].strip("-")


def _seconds(ovh: OvhSection) -> int:
    return MOST_SECONDS if ovh.timeout_hours is None else round(ovh.timeout_hours * 3600)


def _volume(text: str, faults: list[str]) -> dict[str, Any] | None:
    """A volume of the API from the syntax of ``ovhai job run --volume``."""
    match = _VOLUME.fullmatch(text)
    if match is None:
        faults.append(
            f"launch.ovh.volumes: cannot read {text!r}; "
            "write container@alias/prefix:/mount/path:ro|rw|rwd:cache|no-cache"
        )
        return None
    where: dict[str, Any]
    if match["url"]:
        where = {"publicGit": {"url": match["url"]}}
    else:
        store = {"alias": match["alias"], "container": match["container"]}
        where = {"dataStore": {**store, "prefix": match["prefix"]} if match["prefix"] else store}
    permission, cache = (
        (match["permission"] or "ro").upper(),
        (match["cache"] or "no-cache").lower() == "cache",
    )
    return {**where, "mountPath": match["mount"], "permission": permission, "cache": cache}


def _volume_text(volume: Mapping[str, Any]) -> str:
    if "publicGit" in volume:
        source = volume["publicGit"]["url"]
    else:
        store = volume["dataStore"]
        source = f"{store['container']}@{store['alias']}/{store.get('prefix', '')}"
    cache = "cache" if volume["cache"] else "no-cache"
    return f"{source}:{volume['mountPath']}:{volume['permission'].lower()}:{cache}"


# --------------------------------------------------------------------------- what would go wrong
def _machine_faults(recipe: Recipe, ovh: OvhSection) -> Iterator[str]:
    if ovh.region not in REGIONS:
        yield (
            f"launch.ovh.region: {ovh.region!r} has no AI Training; its regions are {' and '.join(REGIONS)} "
            "(the US cloud is a separate platform without it)"
        )
    flavor = FLAVORS.get(ovh.flavor)
    if flavor is None:
        yield f"launch.ovh.flavor: {ovh.flavor!r} is no GPU flavor of AI Training; known: {', '.join(FLAVORS)}"
        return
    if ovh.gpus > flavor.most_gpus:
        yield (
            f"launch.ovh.gpus: {ovh.gpus} x {ovh.flavor} ({flavor.card}) is {ovh.gpus - flavor.most_gpus} more than "
            f"the {flavor.most_gpus} that one job may have"
        )
    if not flavor.bf16 and recipe.effective("bf16") is not False and not recipe.effective("fp16"):
        yield f"launch.ovh.flavor: {ovh.flavor} is a {flavor.card}, which has no bf16; take another flavor or fp16=true"


def _time_faults(recipe: Recipe, ovh: OvhSection) -> Iterator[str]:
    seconds, most = _seconds(ovh), recipe.budget.max_hours
    if not 1 <= seconds <= MOST_SECONDS:
        yield (
            f"launch.ovh.timeout_hours: {ovh.timeout_hours:g} h = {seconds:,} s; the platform takes "
            f"1 to {MOST_SECONDS:,} s (7 days = {MOST_SECONDS // 3600} h)"
        )
    if most is not None and ovh.timeout_hours is None and most * 3600 >= MOST_SECONDS:
        yield (
            f"budget.max_hours: {most:g} h is not below the {MOST_SECONDS // 3600} h after which the platform ends "
            "every job: it would end before it saves"
        )


def _topology_faults(recipe: Recipe, ovh: OvhSection) -> Iterator[str]:
    name = recipe.launch.accelerate_config
    if name is None:
        yield "launch.accelerate_config is not set: a job needs a topology, for example single_gpu or zero3"
        return
    path = _topology(name)
    if not path.is_file():
        yield f"launch.accelerate_config: there is no file {path}, seen from {Path.cwd()}"
        return
    topology = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(topology, dict):
        yield f"launch.accelerate_config: {path} is no accelerate configuration"
    elif topology.get("use_cpu"):
        yield f"launch.accelerate_config: {path} trains on the processor; {ovh.gpus} GPU would be paid and idle"
    elif topology.get("distributed_type") == "NO" and ovh.gpus > 1:
        yield f"launch.accelerate_config: {path} uses 1 GPU; the other {ovh.gpus - 1} would be paid and idle"


def _text_faults(spec: Mapping[str, Any]) -> Iterator[str]:
    advice = "a JobSpec is stored and shown as plain text; see docs/launch.md for where credentials go"
    for variable in spec["envVars"]:
        if is_secret_name(variable["name"]):
            yield f"launch.ovh.env.{variable['name']} is named like a secret: {advice}"
    for place, text in _texts(spec, ""):
        what = secret_in(text) or ("an OVHcloud S3 key" if _OVH_KEY.search(text) else None)
        if what:
            yield f"{place} looks like {what}: {advice}"
        if not text.isprintable():
            yield f"{place} holds a line break or another control character, which no command line can carry"


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for name, child in value.items():
            yield from _texts(child, f"{place}.{name}" if place else str(name))
    elif isinstance(value, Sequence):
        for index, child in enumerate(value):
            yield from _texts(child, f"{place}[{index}]")
