"""Time, memory and the machine: what every benchmark here measures in the same way."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
# Dense bf16 tensor-core peak in TFLOP/s, from the vendor's data sheets; other devices get no utilisation.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(note: str | None) -> dict[str, Any]:
    """Where and with what this was measured."""
    on_gpu = torch.cuda.is_available()
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "command": " ".join(sys.argv),
    }
    return facts | ({"note": note} if note else {})


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def seconds(step: Callable[[], object], *, repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Median and fastest wall time of a step; on a CPU also processor time, which others disturb less."""
    for _ in range(warm_up):
        step()
    wall, processor = [], []
    for _ in range(repeats):
        _synchronise()
        start, busy = time.perf_counter(), time.process_time()
        step()
        _synchronise()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    found = {"median_s": statistics.median(wall), "fastest_s": min(wall)}
    return (
        found if torch.cuda.is_available() else {**found, "processor_median_s": statistics.median(processor)}
    )


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(step: Callable[[], object]) -> int:
    """GPU memory at the peak of a step beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kept_for_backward(forward: Callable[[], Tensor], weights: Iterable[nn.Parameter]) -> int:
    """Bytes that autograd keeps between forward and backward, without the weights themselves."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in weights}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of the expected gradients, all of them as one vector."""
    pairs = list(zip(found, expected, strict=True))
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    whole = sum(float(b.double().square().sum()) for _, b in pairs)
    return (apart / whole) ** 0.5


@contextmanager
def out_of_memory_as(row: dict[str, Any]) -> Any:
    """A variant that does not fit is a result, not a failure of the benchmark."""
    try:
        yield
    except torch.OutOfMemoryError:
        row["out_of_memory"] = True
        torch.cuda.empty_cache()


def utilisation(flops: float, elapsed: float) -> float | None:
    """Share of the device's peak, None where that is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    return None if peak is None else flops / elapsed / (peak * 1e12)


def show(row: dict[str, Any]) -> None:
    """One line per row: names first, then numbers."""
    parts = [f"{value:.4g}" if isinstance(value, float) else f"{value}" for value in row.values()]
    print("  ".join(f"{key}={part}" for key, part in zip(row, parts, strict=True)), flush=True)


def write(name: str, rows: list[dict[str, Any]], facts: dict[str, Any]) -> Path:
    """Keeps the rows as ``results/<day>-<name>-<device>.json``."""
    RESULTS.mkdir(exist_ok=True)
    short = facts["device"].lower().replace(" ", "-")
    path = RESULTS / f"{facts['date'][:10]}-{name}-{short}.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(path)
    return path
