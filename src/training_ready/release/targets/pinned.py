"""Where does TGI's Python live on this machine? An environment of its own with the releases that TGI 3.3.7 pins.

Built once into a cache folder. Torch is not installed a second time: it and what it needs are linked in, distribution
by distribution, so that nothing else of the outer environment is visible inside.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_ready import TrainingReadyError

PINS = (
    "transformers==4.51.0",
    "tokenizers==0.21.0",
    "safetensors==0.5.2",
    "huggingface-hub==0.30.1",
    "accelerate==1.3.0",
    "minijinja==2.8.0",
)


class PinnedError(TrainingReadyError):
    """The isolated environment cannot be built, or what ran in it failed."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where environments are kept: TRAINING_READY_CACHE, else the user's cache."""
    if own := environment.get("TRAINING_READY_CACHE"):
        return Path(own)
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "training-ready"


def pinned_folder(cache: Path) -> Path:
    """The environment for these pins, this torch and this Python; it may not exist yet."""
    torch = importlib.metadata.distribution("torch")
    about = [*PINS, sys.version, torch.version, str(torch.locate_file("").resolve())]  # type: ignore[attr-defined]
    return cache / f"tgi-3.3.7-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"


def pinned_python(cache: Path) -> Path:
    """The interpreter of the isolated environment, built now when it is missing (about 100 MB from the package index).

    Raises PinnedError with the installer's last words.
    """
    folder = pinned_folder(cache)
    if not (folder / "env" / "bin" / "python").exists():
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
        try:
            _build(building)
            os.rename(building, folder)
        except OSError as error:
            if not folder.exists():  # else another process was first
                raise PinnedError(f"{folder} cannot be written: {error}") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder / "env" / "bin" / "python"


def run_pinned(python: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run pinned_reader.py on `job` in the isolated environment and return its answer.

    Raises PinnedError with the end of its error output: that it does not load is a finding too.
    """
    reader = Path(__file__).with_name("pinned_reader.py")
    passed = {
        name: os.environ[name] for name in ("OMP_NUM_THREADS", "PATH", "HOME", "TMPDIR") if name in os.environ
    }
    result = subprocess.run(
        [python, "-I", reader],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**passed, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    if result.returncode:
        last = "\n  ".join(result.stderr.strip().splitlines()[-5:])
        raise PinnedError(
            f"transformers 4.51.0, which TGI 3.3.7 uses, cannot load {job['folder']}:\n  {last}"
        )
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def _build(folder: Path) -> None:
    _link_torch(folder / "torch")
    _run([sys.executable, "-m", "venv", str(folder / "env")])
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    # Relative, so that the folder can be renamed when it is whole.
    (site / "torch.pth").write_text(os.path.relpath(folder / "torch", site) + "\n")
    python = str(folder / "env" / "bin" / "python")
    _run([python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = "\n  ".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise PinnedError(
            f"building the environment of TGI 3.3.7 failed at {' '.join(command[1:4])}:\n  {last}"
        )


def _link_torch(folder: Path) -> None:
    """Links to the files of torch and of every distribution that it requires, and to nothing else."""
    folder.mkdir()
    for distribution in _needed_by("torch").values():
        tops = {
            file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")
        }
        for top in sorted(tops):
            if not (folder / top).exists():
                os.symlink(Path(str(distribution.locate_file(top))).resolve(), folder / top)


def _needed_by(name: str) -> dict[str, importlib.metadata.Distribution]:
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [name]
    while waiting:
        key = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if key in found:
            continue
        found[key] = importlib.metadata.distribution(key)
        requirements = [Requirement(text) for text in found[key].requires or ()]
        waiting += [
            need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found
